/* Sum arrays of several ranks, element by element, and write the sum into all of them.

   The sums of a piece are kept aside until all arrays of that piece are read. A loop that reads and writes two arrays
   in turns is a little faster still, but on some processors three times slower where the addresses of the two happen
   to look alike to the cache (measured on AMD Zen). The order of the additions is that of numpy's passes, so that both
   give the same bits. */

#include <stdint.h>

enum { PIECE = 256 };

#define SUM_INTO_ALL(NAME, TYPE)                                                     \
    void NAME(TYPE *const *arrays, int64_t world, int64_t begin, int64_t end) {      \
        TYPE sums[PIECE];                                                            \
        for (int64_t start = begin; start < end; start += PIECE) {                   \
            int64_t length = end - start < PIECE ? end - start : PIECE;              \
            const TYPE *first = arrays[0] + start, *second = arrays[1] + start;      \
            for (int64_t i = 0; i < length; i++) sums[i] = first[i] + second[i];     \
            for (int64_t rank = 2; rank < world; rank++) {                           \
                const TYPE *other = arrays[rank] + start;                            \
                for (int64_t i = 0; i < length; i++) sums[i] += other[i];            \
            }                                                                        \
            for (int64_t rank = 0; rank < world; rank++) {                           \
                TYPE *other = arrays[rank] + start;                                  \
                for (int64_t i = 0; i < length; i++) other[i] = sums[i];             \
            }                                                                        \
        }                                                                            \
    }

SUM_INTO_ALL(sum_float32, float)
SUM_INTO_ALL(sum_float64, double)
