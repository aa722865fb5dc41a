// Texts of our own statuses, shared by both back ends.
#pragma once

#include <string>

#include "core/context.h"

namespace pdd::bind {

inline std::string own_status_string(Status status) {
    switch (status) {
        case kSuccess:
            return "success";
        case kLabelOutOfRange:
            return "labels must lie in [0, classes)";
        case kUnknownOperation:
            return "an operation is not known to this build";
        case kRowOutOfRange:
            return "index must lie in [0, rows)";
        case kOutOfMemory:
            return "there is no memory left for one image's scratch";
        default:
            return "unknown status " + std::to_string(status);
    }
}

}  // namespace pdd::bind
