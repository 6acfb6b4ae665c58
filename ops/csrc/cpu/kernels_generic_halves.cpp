#define ELSA_HALVES
#include "kernels_generic.cpp"
