#define ELSA_HALVES
#include "kernels_avx512.cpp"
