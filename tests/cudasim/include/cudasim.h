/* Functions that libcudart.so.13 of cudasim has beyond the CUDA runtime. */
#pragma once
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Lets kernels access [p, p + bytes) of host memory.  Ranges may overlap; returns a cudaError_t. */
int cudasim_register_host(const void* p, size_t bytes);
int cudasim_unregister_host(const void* p);

/* Writes the statistics so far to where CUDASIM_STATS says / forgets them. */
void cudasim_write_stats(void);
void cudasim_reset_stats(void);

/* Sets an option from the next launch on, as its environment variable would have at the start; the name is without
 * CUDASIM_, "" or a null value means the default.  ARCH cannot be changed.  Returns a cudaError_t. */
int cudasim_set_option(const char* name, const char* value);

/* Copies the last error report, 0-terminated and cut to `bytes`, and forgets it; returns its length, 0: there is none.
 * With a null `text` it only tells the length. */
size_t cudasim_take_report(char* text, size_t bytes);

#ifdef __cplusplus
}
#endif
