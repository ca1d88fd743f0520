// One source, several instruction sets. Every kernel file is compiled once per set with FASTVDIFF_ISA set to the name
// of the namespace its code lives in; dispatch.cpp picks one when the process starts.
//
// Code compiled for a set must stay inside its namespace: an inline function outside it would be emitted by each of
// the objects, the linker would keep one copy, and a machine without AVX-512 could be given that copy.
#pragma once

#ifndef FASTVDIFF_ISA
#error "compile kernels with -DFASTVDIFF_ISA=generic|avx2|avx512"
#endif

#define FASTVDIFF_BEGIN_ISA \
  namespace fastvdiff {     \
  namespace cpu {           \
  namespace FASTVDIFF_ISA {
#define FASTVDIFF_END_ISA \
  }                       \
  }                       \
  }
