/* Sum arrays of several ranks, element by element, and write the sum into all of them.

   In one pass: numpy needs one to add and one to copy, with the block of the one waiting in the cache for the other.
   The order of the additions is that of numpy's passes, so that both give the same bits. */

#include <stdint.h>

enum { CHUNK = 1024 };

#define SUM_INTO_ALL(NAME, TYPE)                                                                     \
    void NAME(TYPE *const *arrays, int64_t world, int64_t count) {                                   \
        if (world == 2) {                                                                            \
            TYPE *restrict first = arrays[0], *restrict second = arrays[1];                          \
            for (int64_t i = 0; i < count; i++) {                                                    \
                TYPE sum = first[i] + second[i];                                                     \
                first[i] = sum;                                                                      \
                second[i] = sum;                                                                     \
            }                                                                                        \
            return;                                                                                  \
        }                                                                                            \
        for (int64_t start = 0; start < count; start += CHUNK) {                                     \
            int64_t length = count - start < CHUNK ? count - start : CHUNK;                          \
            TYPE *restrict own = arrays[0] + start;                                                  \
            for (int64_t rank = 1; rank < world; rank++) {                                           \
                const TYPE *restrict other = arrays[rank] + start;                                   \
                for (int64_t i = 0; i < length; i++) own[i] += other[i];                             \
            }                                                                                        \
            for (int64_t rank = 1; rank < world; rank++) {                                           \
                TYPE *restrict other = arrays[rank] + start;                                         \
                for (int64_t i = 0; i < length; i++) other[i] = own[i];                              \
            }                                                                                        \
        }                                                                                            \
    }

SUM_INTO_ALL(sum_float32, float)
SUM_INTO_ALL(sum_float64, double)
