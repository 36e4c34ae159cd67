/* Facts about the compiled library, which serve/local_engine/cpu/kernels.py checks before it calls a kernel. */
#include "kernels.h"

const char *vectors(void) {
#if defined(HAS_AVX512)
    return "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "AVX2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "generic C";
#endif
}

int has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* Return the size of struct `number`, 0 after the last. */
int64_t struct_size(int number) {
    static const int64_t sizes[] = {sizeof(Matrix), sizeof(Part), sizeof(Parts), sizeof(Segment), sizeof(Tile),
                                    sizeof(Cache),  sizeof(Heads), sizeof(Layer), sizeof(Shape),  sizeof(Step)};
    return number < (int)(sizeof sizes / sizeof *sizes) ? sizes[number] : 0;
}
