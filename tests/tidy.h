// What g++ has and clang-tidy's front end has not: read before each file by tests/tidy.py, never compiled.
#pragma once

template <class V, class M>
V __builtin_shuffle(V, M);
template <class V, class M>
V __builtin_shuffle(V, V, M);
#if defined(__AVX512F__)
typedef int TidyInts __attribute__((vector_size(64)));
typedef short TidyShorts __attribute__((vector_size(64)));
TidyInts __builtin_ia32_pmaddwd512_mask(TidyShorts, TidyShorts, TidyInts, unsigned short);
#endif
