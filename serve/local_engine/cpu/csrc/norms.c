/* Root mean square norm (arXiv 1910.07467). */
#include <math.h>

#include "kernels.h"

static float factor_of(const float *values, int width, float eps) {
    vec squares = {0};
    float rest = 0;
    int i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec some = *(const vec *)(values + i);
        squares = fma_lanes(some, some, squares);
    }
    for (; i < width; i++) rest += values[i] * values[i];
    return 1.0f / sqrtf((sum_lanes(squares) + rest) / width + eps);
}

/* Compute y = weight * round(x / sqrt(mean(x^2) + eps)), rounded to x's dtype before the weight, as in Llama. */
void rms_norm(const void *x, const void *weight, void *y, int is_bf16, int rows, int width, float eps) {
#pragma omp parallel for schedule(static) if (rows > 16)
    for (int row = 0; row < rows; row++) {
        int64_t at = (int64_t)row * width;
        if (!is_bf16) {
            const float *from = (const float *)x + at, *scale = weight; /* y may be x */
            float *to = (float *)y + at, factor = factor_of(from, width, eps);
            for (int i = 0; i < width; i++) to[i] = from[i] * factor * scale[i];
            continue;
        }
        float values[width];
        widen(values, (const bf16 *)x + at, width);
        float factor = factor_of(values, width, eps);
        const bf16 *scale = weight;
        bf16 *to = (bf16 *)y + at;
        for (int i = 0; i < width; i++) to[i] = to_bf16(from_bf16(to_bf16(values[i] * factor)) * from_bf16(scale[i]));
    }
}
