#define ELSA_HALVES
#include "kernels_avx2.cpp"
