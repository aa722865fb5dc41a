// PDD_BACKEND names the namespace of everything that is compiled more than once: the CPU sources
// are built for several instruction sets and linked into one library. Inline functions outside such
// a namespace would be merged by the linker, and the surviving copy could hold instructions that
// the running CPU lacks.
#pragma once

#ifndef PDD_BACKEND
#error "PDD_BACKEND must name the backend namespace (the build sets it)"
#endif

#if defined(__CUDACC__)
#define PDD_HD __host__ __device__ __forceinline__
#else
#define PDD_HD inline __attribute__((always_inline))
#endif

// A function that is compiled once, as it stands: neither inlined nor copied for arguments that are
// known.
#if defined(__clang__) || defined(__CUDACC__)
#define PDD_ONE_COPY __attribute__((noinline))
#else
#define PDD_ONE_COPY __attribute__((noinline, noclone))
#endif
