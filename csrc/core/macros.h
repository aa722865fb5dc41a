// PDD_BACKEND names the namespace of all code that is compiled more than once: the CPU sources are
// built for several instruction sets and linked into one library. The linker would merge inline
// functions outside such a namespace, and the surviving copy could hold instructions that the
// running CPU lacks.
#pragma once

#ifndef PDD_BACKEND
#error "PDD_BACKEND must name the backend namespace (the build sets it)"
#endif

#if defined(__CUDACC__)
#define PDD_HD __host__ __device__ __forceinline__
#else
#define PDD_HD inline __attribute__((always_inline))
#endif

// Marks a function that is compiled once, as it stands: not inlined, and not cloned for known
// arguments.
#if defined(__clang__) || defined(__CUDACC__)
#define PDD_ONE_COPY __attribute__((noinline))
#else
#define PDD_ONE_COPY __attribute__((noinline, noclone))
#endif
