/* Matrix products of a few rows with NF4, bf16 or fp32 weights.
 *
 * Four outputs' weights are unpacked a panel at a time into the first-level cache and used for all rows. */
#include "kernels.h"

enum { PANEL = 768, CHUNK_ROWS = 48, STRIP = 16 };

/* Eight NF4 weights from four bytes; low and high are the code book times the block's constant. */
#ifdef __AVX2__
static inline vec unpack_eight(const uint8_t *codes, vec low, vec high) {
    int32_t word;
    memcpy(&word, codes, sizeof word);
    __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    __m256 below = _mm256_permutevar8x32_ps((__m256)low, nibbles), above = _mm256_permutevar8x32_ps((__m256)high, nibbles);
    __m256 is_above = _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28)); /* the code's upper bit as the sign */
    return (vec)_mm256_blendv_ps(below, above, is_above);
}
#else
static inline vec unpack_eight(const uint8_t *codes, vec low, vec high) {
    vec found;
    for (int i = 0; i < LANES; i++) {
        int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
        found[i] = code < 8 ? low[code] : high[code - 8];
    }
    return found;
}
#endif

static void unpack_nf4(const Matrix *m, int64_t at, int n, float *restrict to) {
    vec low = *(const vec *)m->book, high = *(const vec *)(m->book + LANES);
    const uint8_t *codes = (const uint8_t *)m->weights + at / 2;
    const float *absmax = m->absmax + at / m->block;
    for (int k = 0; k < n; k += m->block) {
        vec mine = low * *absmax, above = high * *absmax;
        absmax++;
        for (int i = 0; i < m->block; i += LANES, codes += LANES / 2)
            *(vec *)(to + k + i) = unpack_eight(codes, mine, above);
    }
}

static const float *panel_of(const Matrix *m, int output, int first, int n, float *restrict room) {
    int64_t at = (int64_t)output * m->in + first;
    if (m->kind == MATRIX_FP32) return (const float *)m->weights + at;
    if (m->kind == MATRIX_BF16)
        widen(room, (const bf16 *)m->weights + at, n);
    else
        unpack_nf4(m, at, n, room);
    return room;
}

/* Four outputs of some rows, into a strip whose rows are STRIP floats apart. */
static void four_outputs(const Matrix *m, int first, int outputs, const float *x, int64_t x_stride, float *strip,
                         int rows) {
    float room[TILE_OUTPUTS][PANEL] __attribute__((aligned(64)));
    vec sums[CHUNK_ROWS][TILE_OUTPUTS];
    memset(sums, 0, sizeof(sums[0]) * rows);
    for (int k = 0; k < m->in; k += PANEL) {
        int n = m->in - k < PANEL ? m->in - k : PANEL;
        const float *w[TILE_OUTPUTS];
        for (int o = 0; o < TILE_OUTPUTS; o++)
            w[o] = o < outputs ? panel_of(m, first + o, k, n, room[o]) : w[0];
        for (int r = 0; r < rows; r += TILE_ROWS) {
            int tile = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            const float *at[TILE_ROWS];
            for (int i = 0; i < tile; i++) at[i] = x + (r + i) * x_stride + k;
            multiply_rows(w, at, n, &sums[r], tile);
        }
    }
    for (int r = 0; r < rows; r++) {
        float four[TILE_OUTPUTS];
        sum_four(sums[r], four);
        for (int o = 0; o < outputs; o++) strip[r * STRIP + o] = four[o] + (m->bias ? m->bias[first + o] : 0.0f);
    }
}

/* A strip of outputs is as wide as a cache line, so that no line of y is written in pieces. */
static void one_strip(const Matrix *m, int first, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows) {
    float strip[CHUNK_ROWS * STRIP];
    int outputs = m->out - first < STRIP ? m->out - first : STRIP;
    for (int o = 0; o < outputs; o += TILE_OUTPUTS)
        four_outputs(m, first + o, outputs - o < TILE_OUTPUTS ? outputs - o : TILE_OUTPUTS, x, x_stride, strip + o, rows);
    for (int r = 0; r < rows; r++) memcpy(y + r * y_stride + first, strip + r * STRIP, outputs * sizeof(float));
}

/* y [rows, out] = x [rows, in] W^T + bias; rows are `x_stride` and `y_stride` floats apart. `in` is a multiple of 8,
 * and of the block for NF4. */
void matmul(const Matrix *matrix, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows) {
    for (int r = 0; r < rows; r += CHUNK_ROWS) {
        int chunk = rows - r < CHUNK_ROWS ? rows - r : CHUNK_ROWS;
#pragma omp parallel for schedule(static)
        for (int output = 0; output < matrix->out; output += STRIP)
            one_strip(matrix, output, x + r * x_stride, x_stride, y + r * y_stride, y_stride, chunk);
    }
}
