// express.h and its initialisers as a C++ compiler sees them.
#include "abi.c"
