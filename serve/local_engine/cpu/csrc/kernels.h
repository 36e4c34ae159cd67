/* What the kernels have in common: vectors of floats, bf16, and the structs that serve/local_engine/cpu/structs.py fills
 * in, which checks every tensor that an address here points to.
 *
 * Everything is computed in fp32. Every sum belongs to one row and has one order, whatever else is in the batch: a
 * row's results are the same bits alone, beside others, in one chunk or in many.
 */
#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Floats in a vector, and the size of a tile of rows and outputs whose sums fit the registers: 32 with AVX-512, else 16.
 * Widths are multiples of 16, so that every processor computes the same models. */
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define HAS_AVX512
enum { LANES = 16, TILE_ROWS = 6, TILE_OUTPUTS = 4 };
#else
enum { LANES = 8, TILE_ROWS = 3, TILE_OUTPUTS = 4 };
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint16_t bf16;

/* a * b + c, rounded once where the processor can. Written out, because a compiler that may contract does so in one
 * copy of a loop and not in another. */
static inline vec fma_lanes(vec a, vec b, vec c) {
#if defined(HAS_AVX512)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* Keep a loaded vector in its register. Otherwise the compiler loads it again for each multiplication, and the products
 * wait for the loads: 60 GFLOP/s instead of 90 on Zen 3. */
#if defined(HAS_AVX512)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__AVX2__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v) (void)(v)
#endif
#ifdef __FP_FAST_FMAF
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

static inline vec all_lanes(float value) {
    return value - (vec){0};
}

static inline float from_bf16(bf16 value) {
    union { uint32_t bits; float number; } u = {(uint32_t)value << 16};
    return u.number;
}

/* Round to nearest even, as torch does; NaN stays NaN. */
static inline bf16 to_bf16(float value) {
    union { float number; uint32_t bits; } u = {value};
    bf16 rounded = (bf16)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
    return value == value ? rounded : 0x7fc0;
}

static inline vec lanes_of_bf16(const bf16 *from) {
#ifdef HAS_AVX512
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    vec found;
    for (int i = 0; i < LANES; i++) found[i] = from_bf16(from[i]);
    return found;
#endif
}

static inline void widen(float *restrict to, const bf16 *restrict from, int n) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) *(vec *)(to + i) = lanes_of_bf16(from + i);
    for (; i < n; i++) to[i] = from_bf16(from[i]);
}

/* Sum the lanes of each of four vectors. */
#ifdef HAS_AVX512
static inline void sum_four(const vec *v, float *to) {
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]), _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]), _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#else
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

static inline void sum_four(const vec *v, float *to) {
    vec first = PICK(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13) +
                PICK(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
    vec second = PICK(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13) +
                 PICK(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
    vec all = PICK(first, second, 0, 1, 8, 9, 4, 5, 12, 13) +
              PICK(first, second, 2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; i++) to[i] = all[i] + all[i + 4];
}
#endif

static inline float sum_lanes(vec v) {
    float sums[LANES];
    memcpy(sums, &v, sizeof sums);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

/* exp(x) for x <= 0, within about 2e-7; 0 far below, NaN for NaN: 2^n by the exponent bits, the rest by a polynomial. */
static inline float exp_negative(float x) {
    float clamped = x >= -87.0f ? x : -87.0f;
    float n = __builtin_rintf(clamped * 1.44269504f);
    float r = FMA(n, -0.693359375f, clamped);
    r = FMA(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = FMA(p, r, 1.3981999507e-3f);
    p = FMA(p, r, 8.3334519073e-3f);
    p = FMA(p, r, 4.1665795894e-2f);
    p = FMA(p, r, 1.6666665459e-1f);
    p = FMA(p, r, 5.0000001201e-1f);
    union { int32_t bits; float number; } power = {((int32_t)n + 127) << 23};
    float far_below = x == x ? 0.0f : x;
    return x >= -87.0f ? (FMA(p * r, r, r) + 1.0f) * power.number : far_below;
}

/* Add the products of x[r] and w[o] to sums[r][o], lane by lane. */
static inline __attribute__((always_inline)) void multiply_tile(const float *const *w, const float *const *x, int n,
                                                                vec (*sums)[TILE_OUTPUTS], const int rows) {
    vec s[TILE_ROWS][TILE_OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < TILE_OUTPUTS; o++) s[r][o] = sums[r][o];
    for (int k = 0; k < n; k += LANES) {
        vec rows_of_x[TILE_ROWS];
        for (int r = 0; r < rows; r++) {
            rows_of_x[r] = *(const vec *)(x[r] + k);
            IN_REGISTER(rows_of_x[r]);
        }
        for (int o = 0; o < TILE_OUTPUTS; o++) {
            vec weights = *(const vec *)(w[o] + k);
            IN_REGISTER(weights);
            for (int r = 0; r < rows; r++) s[r][o] = fma_lanes(rows_of_x[r], weights, s[r][o]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < TILE_OUTPUTS; o++) sums[r][o] = s[r][o];
}

/* Number of rows for the next tile: never so many that one row is left, for a tile of one row waits for its own sums. */
static inline int tile_of(int rows_left) {
    if (rows_left == TILE_ROWS + 1) return TILE_ROWS - 1;
    return rows_left < TILE_ROWS ? rows_left : TILE_ROWS;
}

static inline void multiply_rows(const float *const *w, const float *const *x, int n, vec (*sums)[TILE_OUTPUTS],
                                 int rows) {
    switch (rows) { /* a copy of the loop for each count, its sums in registers */
#ifdef HAS_AVX512
    case 6: multiply_tile(w, x, n, sums, 6); break;
    case 5: multiply_tile(w, x, n, sums, 5); break;
    case 4: multiply_tile(w, x, n, sums, 4); break;
#endif
    case 3: multiply_tile(w, x, n, sums, 3); break;
    case 2: multiply_tile(w, x, n, sums, 2); break;
    default: multiply_tile(w, x, n, sums, 1);
    }
}

/* A weight matrix, [out, in] by rows. */
typedef struct {
    int32_t kind; /* MATRIX_... */
    int32_t in, out;
    int32_t block;       /* NF4: weights that share a constant */
    const void *weights; /* NF4: two 4-bit codes a byte, the first in the upper half */
    const float *absmax; /* NF4: [out * in / block] */
    const float *book;   /* NF4: the 16 values of the codes */
    const float *bias;   /* [out] or NULL */
} Matrix;

enum { MATRIX_FP32, MATRIX_BF16, MATRIX_NF4 };

/* An adapter's update of some columns of a group of layers: A [rank, in], B transposed [rank, out], each fp32 or bf16;
 * `magnitude` [out] is DoRA's m / |W + s B A|, or NULL. */
typedef struct {
    const void *a, *bt;
    const float *magnitude;
    float scaling;
    int32_t rank, out, offset, a_is_bf16, bt_is_bf16;
} Part;

typedef struct {
    const Part *parts;
    int32_t count;
} Parts;

/* Rows start to end of the batch use the adapter whose parts of every group are `groups`. Several adapters on the same
 * rows are a chain: the first carries their number, the others 0. */
typedef struct {
    const Parts *groups;
    float scale;
    int32_t start, end, chain;
} Segment;

/* Rows row to row + rows of the batch: tokens start, start+1, ... of the sequence whose block numbers begin at `blocks`. */
typedef struct {
    const int32_t *blocks;
    int32_t row, rows, start;
} Tile;

/* The keys and values of one layer, fp32 [kv_heads, slots, dim]; token t is in slot blocks[t / size] * size + t % size. */
typedef struct {
    float *keys, *values;
    int64_t slots;
    int32_t block_size;
} Cache;

typedef struct {
    int32_t heads, kv_heads, dim, window; /* window 0: none */
    float scale, softcap;                 /* softcap 0: none */
} Heads;

/* One decoder layer of a Llama-like model, the settings of the model, and one step. */
typedef struct {
    Matrix qkv, output, gate_up, down;
    const float *input_norm, *post_norm; /* [hidden] */
    const float *query_norm, *key_norm;  /* [dim] or NULL (Qwen3) */
    float *keys, *values;                /* as Cache has them */
    int32_t qkv_group, output_group, gate_up_group, down_group, window;
} Layer;

typedef struct {
    Heads heads;
    int64_t slots;
    int32_t hidden, intermediate, block_size;
    float eps;
} Shape;

typedef struct {
    const Tile *tiles;
    const Segment *segments;
    const float *cosine, *sine; /* [rows, dim] */
    int32_t rows, num_tiles, num_segments;
} Step;

/* Functions that return an int return 0, or -1 when there is no memory. */
void matmul(const Matrix *matrix, const float *x, int64_t x_stride, float *y, int64_t y_stride, int rows);
int low_rank_updates(const Segment *segments, int count, int group, const void *x, int64_t x_stride, void *y,
                     int64_t y_stride, int is_bf16, int in, int out, const float *bias);
void attention(const Heads *shape, const Cache *cache, const Tile *tiles, int count, const float *query,
               int64_t head_stride, int64_t row_stride, float *out);
void rms_norm(const void *x, const void *weight, void *y, int is_bf16, int rows, int width, float eps);
int run_layers(const Shape *shape, const Layer *layers, int num_layers, const Step *step, float *hidden, float *room);
