/* Matrix products of a few rows with NF4, bf16 or fp32 weights.
 *
 * Four outputs' weights are unpacked a panel at a time into the first-level cache and used for all rows. */
#include <stdlib.h>

#include "kernels.h"

enum { PANEL = 768, CHUNK_ROWS = 48, STRIP = 16 };

/* NF4 weights are unpacked 64 at a time, in another order than they are stored in; x is put in that order once per
 * product. */
enum { SHUFFLED = 64 };

/* Rows of weights to prefetch: with few rows of x, memory is the limit. */
enum { AHEAD = 2 * TILE_OUTPUTS };

/* Rows of a tile that is multiplied by each weight as it is unpacked: 4 x 4 sums leave registers for the unpacking. Up to
 * DIRECT_NF4 or DIRECT_BF16 rows of x, that is faster than unpacking into a panel first (Zen 5, all layers of
 * SmolLM2: NF4 at 4 rows 7.2 instead of 11 ms, at 6 no gain; the bf16 head at 16 rows 8.7 instead of 13.4 ms, at 32 no
 * gain). */
#ifdef HAS_AVX512
enum { DIRECT_ROWS = 4, DIRECT_NF4 = 4, DIRECT_BF16 = 16 };
#else
enum { DIRECT_ROWS = 1, DIRECT_NF4 = 1, DIRECT_BF16 = 0 };
#endif

/* 2^shift runs have one constant: a division for each would take longer than the unpacking. */
static int shift_of(const Matrix *m) {
    return __builtin_ctz(m->block / SHUFFLED);
}

#if defined(HAS_AVX512)
/* 32 bytes are eight words of eight codes. Both halves of a register hold them, each shifted by another code, so that a
 * look-up is one vpermps, which reads the lowest four bits of a lane and ignores the rest. */
typedef struct {
    __m512 book;
    int shift;
} Tables;

static Tables tables_of(const Matrix *m) {
    return (Tables){_mm512_loadu_ps(m->book), shift_of(m)};
}

/* Unpack 64 weights from 32 bytes. */
static inline __attribute__((always_inline)) void unpack_run(const Tables *tables, const uint8_t *codes, float absmax,
                                                             vec *to) {
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
    __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)codes));
    __m512 scaled = _mm512_mul_ps(tables->book, _mm512_set1_ps(absmax));
    words = _mm512_srlv_epi32(words, upper);
    for (int i = 0; i < 4; i++) to[i] = (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 8 * i), scaled);
}

/* Index in a run of 64 of the weight that is unpacked to `place`: vector i holds byte i of each word, the low code in
 * its lower half, and the low code is the later weight. */
static int origin_of(int place) {
    int vector = place / LANES, lane = place % LANES;
    return lane % 8 * 8 + vector * 2 + (lane < 8);
}
#elif defined(__AVX2__)
/* Look up NF4 values by byte shuffles: four tables have the four bytes of each value of the code book. A shuffle of whole
 * floats took twice as long on Zen 3. */
typedef struct {
    __m256i bytes[4];
    int shift;
} Tables;

static Tables tables_of(const Matrix *m) {
    Tables tables = {.shift = shift_of(m)};
    for (int byte = 0; byte < 4; byte++) {
        uint8_t table[16];
        for (int code = 0; code < 16; code++) memcpy(&table[code], (const uint8_t *)&m->book[code] + byte, 1);
        tables.bytes[byte] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    }
    return tables;
}

/* Turn 32 codes, one a byte, into 4 x 8 values times scale: of each 128-bit lane the first four, the next four, ... */
static inline __attribute__((always_inline)) void look_up(const Tables *tables, __m256i codes, __m256 scale, vec *to) {
    __m256i b[4];
    for (int i = 0; i < 4; i++) b[i] = _mm256_shuffle_epi8(tables->bytes[i], codes);
    __m256i low01 = _mm256_unpacklo_epi8(b[0], b[1]), high01 = _mm256_unpackhi_epi8(b[0], b[1]);
    __m256i low23 = _mm256_unpacklo_epi8(b[2], b[3]), high23 = _mm256_unpackhi_epi8(b[2], b[3]);
    __m256i values[4] = {_mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
                         _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)};
    for (int i = 0; i < 4; i++) to[i] = (vec)_mm256_mul_ps(_mm256_castsi256_ps(values[i]), scale);
}

/* Unpack 64 weights from 32 bytes. */
static inline __attribute__((always_inline)) void unpack_run(const Tables *tables, const uint8_t *codes, float absmax,
                                                             vec *to) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i both = _mm256_loadu_si256((const __m256i *)codes);
    __m256 scale = _mm256_set1_ps(absmax);
    look_up(tables, _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), scale, to);
    look_up(tables, _mm256_and_si256(both, nibble), scale, to + 4);
}

/* Index in a run of 64 of the weight that is unpacked to `place`. */
static int origin_of(int place) {
    int half = place / 32, vector = place % 32 / LANES, lane = place % LANES;
    return 2 * (vector * 4 + lane % 4 + lane / 4 * 16) + half;
}
#else
typedef struct { int shift; } Tables;

static Tables tables_of(const Matrix *m) {
    return (Tables){shift_of(m)};
}

static void unpack_run(const Tables *tables, const uint8_t *codes, float absmax, vec *to) {
    (void)tables, (void)codes, (void)absmax;
    memset(to, 0, SHUFFLED * sizeof(float)); /* never called: nothing is shuffled here */
}

static int origin_of(int place) {
    return place;
}
#endif

static int can_shuffle(const Matrix *m) {
#ifdef __AVX2__
    return m->kind == MATRIX_NF4 && m->block % SHUFFLED == 0 && (m->block & (m->block - 1)) == 0;
#else
    return m == 0;
#endif
}

static void unpack_shuffled(const Matrix *m, const Tables *tables, int64_t at, int n, float *restrict to) {
    const uint8_t *codes = (const uint8_t *)m->weights + at / 2;
    int64_t ahead = (int64_t)AHEAD * m->in / 2, run = at / SHUFFLED; /* counted from the first weight: a panel may begin inside a block */
    for (int k = 0; k < n; k += SHUFFLED, run++) {
        __builtin_prefetch(codes + k / 2 + ahead);
        unpack_run(tables, codes + k / 2, m->absmax[run >> tables->shift], (vec *)(to + k));
    }
}

/* Compute four outputs of a tile of rows, each weight used as it is unpacked; sums in the same order as by panels. */
static inline __attribute__((always_inline)) void direct_tile(const Matrix *m, const Tables *tables, int first,
                                                              const float *x, int64_t x_stride, vec (*sums)[TILE_OUTPUTS],
                                                              const int rows) {
    vec s[DIRECT_ROWS][TILE_OUTPUTS] = {0};
    const int is_bf16 = m->kind == MATRIX_BF16;
    const int64_t row_bytes = is_bf16 ? 2 * (int64_t)m->in : m->in / 2, run_bytes = is_bf16 ? 2 * SHUFFLED : SHUFFLED / 2;
    const char *from = (const char *)m->weights + first * row_bytes;
    const float *absmax = is_bf16 ? 0 : m->absmax + (int64_t)first * m->in / m->block;
    const int64_t row_constants = is_bf16 ? 0 : m->in / m->block;
    for (int k = 0, run = 0; k < m->in; k += SHUFFLED, run++, from += run_bytes) {
#pragma GCC unroll 4
        for (int o = 0; o < TILE_OUTPUTS; o++) {
            const char *mine = from + o * row_bytes;
            vec weights[SHUFFLED / LANES];
            __builtin_prefetch(mine + AHEAD * row_bytes);
            if (is_bf16) {
                __builtin_prefetch(mine + AHEAD * row_bytes + 64);
#pragma GCC unroll 8
                for (int i = 0; i < SHUFFLED / LANES; i++) weights[i] = lanes_of_bf16((const bf16 *)mine + i * LANES);
            } else {
                unpack_run(tables, (const uint8_t *)mine, absmax[o * row_constants + (run >> tables->shift)], weights);
            }
#pragma GCC unroll 8
            for (int i = 0; i < SHUFFLED / LANES; i++)
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
                    s[r][o] = fma_lanes(*(const vec *)(x + r * x_stride + k + i * LANES), weights[i], s[r][o]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < TILE_OUTPUTS; o++) sums[r][o] = s[r][o];
}

static void multiply_directly(const Matrix *m, const Tables *tables, int first, const float *x, int64_t x_stride,
                              vec (*sums)[TILE_OUTPUTS], int rows) {
    for (int r = 0, tile; r < rows; r += tile) {
        tile = rows - r < DIRECT_ROWS ? rows - r : DIRECT_ROWS;
        switch (tile) {
#ifdef HAS_AVX512
        case 4: direct_tile(m, tables, first, x + r * x_stride, x_stride, sums + r, 4); break;
        case 3: direct_tile(m, tables, first, x + r * x_stride, x_stride, sums + r, 3); break;
        case 2: direct_tile(m, tables, first, x + r * x_stride, x_stride, sums + r, 2); break;
#endif
        default: direct_tile(m, tables, first, x + r * x_stride, x_stride, sums + r, 1);
        }
    }
}

static int can_go_direct(const Matrix *m, const Tables *tables, int rows) {
    if (m->kind == MATRIX_BF16) return m->in % SHUFFLED == 0 && rows <= DIRECT_BF16;
    return tables && rows <= DIRECT_NF4;
}

static void unpack_in_order(const Matrix *m, int64_t at, int n, float *restrict to) {
    const uint8_t *codes = (const uint8_t *)m->weights + at / 2;
    for (int k = 0; k < n; k += 2) {
        float scale = m->absmax[(at + k) / m->block];
        to[k] = m->book[codes[k / 2] >> 4] * scale;
        to[k + 1] = m->book[codes[k / 2] & 15] * scale;
    }
}

/* Copy [rows, width] in the order in which weights are unpacked. */
static void shuffle_rows(const float *restrict x, int64_t stride, int rows, int width, float *restrict to) {
    int origin[SHUFFLED];
    for (int place = 0; place < SHUFFLED; place++) origin[place] = origin_of(place);
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < width; k += SHUFFLED)
            for (int place = 0; place < SHUFFLED; place++)
                to[(int64_t)r * width + k + place] = x[r * stride + k + origin[place]];
}

static const float *panel_of(const Matrix *m, const Tables *tables, int output, int first, int n, float *restrict room) {
    int64_t at = (int64_t)output * m->in + first;
    if (m->kind == MATRIX_FP32) return (const float *)m->weights + at;
    if (m->kind == MATRIX_BF16)
        widen(room, (const bf16 *)m->weights + at, n);
    else if (tables)
        unpack_shuffled(m, tables, at, n, room);
    else
        unpack_in_order(m, at, n, room);
    return room;
}

/* Compute four outputs of some rows, into a strip whose rows are STRIP floats apart. */
static void four_outputs(const Matrix *m, const Tables *tables, int first, int outputs, const float *x, int64_t x_stride,
                         float *strip, int rows) {
    float room[TILE_OUTPUTS][PANEL] __attribute__((aligned(64)));
    vec sums[CHUNK_ROWS][TILE_OUTPUTS];
    int direct = outputs == TILE_OUTPUTS && can_go_direct(m, tables, rows);
    if (direct)
        multiply_directly(m, tables, first, x, x_stride, sums, rows);
    else
        memset(sums, 0, sizeof(sums[0]) * rows);
    for (int k = direct ? m->in : 0; k < m->in; k += PANEL) {
        int n = m->in - k < PANEL ? m->in - k : PANEL;
        const float *w[TILE_OUTPUTS];
        for (int o = 0; o < TILE_OUTPUTS; o++)
            w[o] = o < outputs ? panel_of(m, tables, first + o, k, n, room[o]) : w[0];
        for (int r = 0, tile; r < rows; r += tile) {
            tile = tile_of(rows - r);
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

/* Compute a strip of outputs, as wide as a cache line, so that each line of y is written at once. */
static void one_strip(const Matrix *m, const Tables *tables, int first, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows) {
    float strip[CHUNK_ROWS * STRIP];
    int outputs = m->out - first < STRIP ? m->out - first : STRIP;
    for (int o = 0; o < outputs; o += TILE_OUTPUTS)
        four_outputs(m, tables, first + o, outputs - o < TILE_OUTPUTS ? outputs - o : TILE_OUTPUTS, x, x_stride, strip + o,
                     rows);
    for (int r = 0; r < rows; r++) memcpy(y + r * y_stride + first, strip + r * STRIP, outputs * sizeof(float));
}

/* Compute y [rows, out] = x [rows, in] W^T + bias; rows are `x_stride` and `y_stride` floats apart. `in` is a multiple
 * of 16, and of the block for NF4. */
void matmul(const Matrix *matrix, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows) {
    Tables tables;
    float *shuffled = 0;
    if (can_shuffle(matrix) && (shuffled = malloc((int64_t)rows * matrix->in * sizeof(float)))) {
        tables = tables_of(matrix);
        shuffle_rows(x, x_stride, rows, matrix->in, shuffled);
        x = shuffled;
        x_stride = matrix->in;
    }
    for (int r = 0; r < rows; r += CHUNK_ROWS) {
        int chunk = rows - r < CHUNK_ROWS ? rows - r : CHUNK_ROWS;
#pragma omp parallel for schedule(static)
        for (int output = 0; output < matrix->out; output += STRIP)
            one_strip(matrix, shuffled ? &tables : 0, output, x + r * x_stride, x_stride, y + r * y_stride, y_stride, chunk);
    }
    free(shuffled);
}
