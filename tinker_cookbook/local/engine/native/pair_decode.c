/* `decode_kernels.c` for rows and matrices that are rounded to bfloat16 and multiplied in pairs. */
#define PAIRS
#include "decode_kernels.c"
