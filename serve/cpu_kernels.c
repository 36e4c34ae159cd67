/* What a decode step on a CPU needs and torch does in many small calls: low-rank updates of rows that belong to
 * different adapters, attention of single rows over a paged cache, RMS norm, rotary embedding, SiLU gate.
 *
 * Plain C, called through ctypes (cpu_kernels.py compiles it). Rows are bf16 or fp32, sums are fp32. bf16 is the upper
 * half of a float, rounded to nearest even. OpenMP shares torch's threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float from_bf16(bf16 value) {
    union { uint32_t bits; float number; } u = {(uint32_t)value << 16};
    return u.number;
}

static inline bf16 to_bf16(float value) {
    union { float number; uint32_t bits; } u = {value};
    return (bf16)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}

static void load(float *restrict to, const void *from, int is_bf16, int n) {
    if (!is_bf16) {
        memcpy(to, from, n * sizeof(float));
        return;
    }
    const bf16 *restrict half = from;
    for (int i = 0; i < n; i++) to[i] = from_bf16(half[i]);
}

static void store(void *to, const float *restrict from, int is_bf16, int n) {
    if (!is_bf16) {
        memcpy(to, from, n * sizeof(float));
        return;
    }
    bf16 *restrict half = to;
    for (int i = 0; i < n; i++) half[i] = to_bf16(from[i]);
}

static const char *row_of(const void *base, int64_t row, int64_t stride, int is_bf16) {
    return (const char *)base + row * stride * (is_bf16 ? 2 : 4);
}

/* One low-rank update of a run of rows: y[start..end, offset..offset+out] += scale * (x A^T) B^T.
 * A is [rank, in] and bt is B transposed, [rank, out]: both are read along their rows. The first of `chain` updates
 * that touch the same numbers carries the count, the rest zero: one thread takes them together. */
typedef struct {
    int32_t start, end, rank, out, offset, chain;
    float scale;
    const void *a, *bt;
} Update;

enum { MAX_RANK = 1024, TILE = 4 };

static float dot(const float *restrict x, const void *restrict w, int is_bf16, int n) {
    float sum = 0;
    if (is_bf16) {
        const bf16 *restrict half = w;
        for (int i = 0; i < n; i++) sum += x[i] * from_bf16(half[i]);
    } else {
        const float *restrict full = w;
        for (int i = 0; i < n; i++) sum += x[i] * full[i];
    }
    return sum;
}

#define ADD_RANKS(TYPE, READ)                                                                                  \
    for (int r = 0; r < rank; r += TILE) {                                                                     \
        int last = rank - 1;                                                                                   \
        const TYPE *b0 = (const TYPE *)bt + (int64_t)r * out;                                                  \
        const TYPE *b1 = (const TYPE *)bt + (int64_t)(r + 1 > last ? last : r + 1) * out;                      \
        const TYPE *b2 = (const TYPE *)bt + (int64_t)(r + 2 > last ? last : r + 2) * out;                      \
        const TYPE *b3 = (const TYPE *)bt + (int64_t)(r + 3 > last ? last : r + 3) * out;                      \
        float h0 = hidden[r], h1 = r + 1 > last ? 0 : hidden[r + 1];                                           \
        float h2 = r + 2 > last ? 0 : hidden[r + 2], h3 = r + 3 > last ? 0 : hidden[r + 3];                    \
        for (int o = 0; o < out; o++) y[o] += h0 * READ(b0[o]) + h1 * READ(b1[o]) + h2 * READ(b2[o]) + h3 * READ(b3[o]); \
    }
#define AS_IS(value) (value)

static void add_ranks(float *restrict y, const float *restrict hidden, const void *restrict bt, int is_bf16, int rank,
                      int out) {
    if (is_bf16) {
        ADD_RANKS(bf16, from_bf16)
    } else {
        ADD_RANKS(float, AS_IS)
    }
}

static void update_rows(const Update *update, const void *x, int64_t x_stride, void *y, int64_t y_stride, int is_bf16,
                        int in, int weights_are_bf16) {
    float row[in], sum[update->out], hidden[MAX_RANK];
    int64_t a_row = (int64_t)in * (weights_are_bf16 ? 2 : 4);
    for (int at = update->start; at < update->end; at++) {
        load(row, row_of(x, at, x_stride, is_bf16), is_bf16, in);
        for (int r = 0; r < update->rank; r++)
            hidden[r] = update->scale * dot(row, (const char *)update->a + r * a_row, weights_are_bf16, in);
        char *target = (char *)row_of(y, at, y_stride, is_bf16) + update->offset * (is_bf16 ? 2 : 4);
        load(sum, target, is_bf16, update->out);
        add_ranks(sum, hidden, update->bt, weights_are_bf16, update->rank, update->out);
        store(target, sum, is_bf16, update->out);
    }
}

/* x [rows, in] and y [rows, ...], both bf16 or both fp32, rows `x_stride` and `y_stride` numbers apart. */
void low_rank_updates(const void *x, int64_t x_stride, void *y, int64_t y_stride, int is_bf16, int in,
                      const Update *updates, int num_updates, int weights_are_bf16) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int first = 0; first < num_updates; first++)
        for (int u = first; u < first + updates[first].chain; u++)
            update_rows(&updates[u], x, x_stride, y, y_stride, is_bf16, in, weights_are_bf16);
}

/* exp for x <= 0, to about 2e-7: 2^n by the exponent bits, the rest by a polynomial; loops over it use vectors. */
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float number; } power = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * power.number;
}

typedef struct {
    const float *keys, *values; /* [slots, dim] of one KV head */
    const int64_t *slots;
    int first, length;
    float scale, softcap;
} Past;

/* Inlined with a literal `dim`, so that sums over it stay in registers. */
static inline __attribute__((always_inline)) void attend(const float *restrict q, const Past *past, float *restrict weights,
                                                         float *restrict sum, const int dim) {
    float best = -INFINITY, total = 0;
    for (int t = past->first; t < past->length; t++) {
        const float *restrict key = past->keys + past->slots[t] * dim;
        float score = 0;
        for (int d = 0; d < dim; d++) score += q[d] * key[d];
        weights[t] = score * past->scale;
    }
    if (past->softcap > 0)
        for (int t = past->first; t < past->length; t++)
            weights[t] = past->softcap * tanhf(weights[t] / past->softcap);
    for (int t = past->first; t < past->length; t++) best = weights[t] > best ? weights[t] : best;
    for (int t = past->first; t < past->length; t++) total += weights[t] = exp_negative(weights[t] - best);
    float inverse = 1.0f / total;
    for (int d = 0; d < dim; d++) sum[d] = 0;
    for (int t = past->first; t < past->length; t++) {
        const float *restrict value = past->values + past->slots[t] * dim;
        float weight = weights[t] * inverse;
        for (int d = 0; d < dim; d++) sum[d] += weight * value[d];
    }
}

/* One query row per sequence over its cached tokens.
 * query [heads, ..., dim] with head_stride and row_stride; keys and values fp32 [kv_heads, num_slots, dim];
 * slots [rows, longest] of each sequence's tokens, of which the first lengths[row] count; out [N, heads, dim]. */
void decode_attention(const void *query, int64_t head_stride, int64_t row_stride, int is_bf16, const int64_t *row_index,
                      int rows, int heads, int kv_heads, int dim, const float *keys, const float *values,
                      int64_t num_slots, const int64_t *slots, const int64_t *lengths, int64_t longest, float scale,
                      int window, float softcap, void *out) {
    int group = heads / kv_heads, size = is_bf16 ? 2 : 4;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int row = 0; row < rows; row++) {
        for (int kv = 0; kv < kv_heads; kv++) {
            int length = (int)lengths[row];
            Past past = {
                .keys = keys + (int64_t)kv * num_slots * dim, .values = values + (int64_t)kv * num_slots * dim,
                .slots = slots + row * longest, .first = window > 0 && length > window ? length - window : 0,
                .length = length, .scale = scale, .softcap = softcap,
            };
            float q[dim], sum[dim], weights[length];
            for (int head = kv * group; head < (kv + 1) * group; head++) {
                load(q, row_of(query, head * head_stride + row_index[row] * row_stride, 1, is_bf16), is_bf16, dim);
                if (dim == 64)
                    attend(q, &past, weights, sum, 64);
                else if (dim == 128)
                    attend(q, &past, weights, sum, 128);
                else
                    attend(q, &past, weights, sum, dim);
                store((char *)out + (row_index[row] * heads + head) * dim * size, sum, is_bf16, dim);
            }
        }
    }
}

/* y = weight * round(x / sqrt(mean(x^2) + eps)): the rounding to x's dtype before the weight is Llama's. */
void rms_norm(const void *x, const void *weight, void *y, int is_bf16, int rows, int width, float eps) {
    float scale[width];
    load(scale, weight, is_bf16, width);
    for (int row = 0; row < rows; row++) {
        float values[width], squares = 0;
        load(values, row_of(x, row, width, is_bf16), is_bf16, width);
        for (int i = 0; i < width; i++) squares += values[i] * values[i];
        float factor = 1.0f / sqrtf(squares / width + eps);
        if (is_bf16)
            for (int i = 0; i < width; i++) values[i] = from_bf16(to_bf16(values[i] * factor)) * scale[i];
        else
            for (int i = 0; i < width; i++) values[i] = values[i] * factor * scale[i];
        store((char *)row_of(y, row, width, is_bf16), values, is_bf16, width);
    }
}
