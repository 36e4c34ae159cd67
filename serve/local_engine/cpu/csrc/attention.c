/* Causal attention of any rows over a KV cache in blocks, with the online softmax of FlashAttention (arXiv 2205.14135,
 * algorithm 1) over runs of 64 keys counted from the sequence's start. */
#include <math.h>

#include "kernels.h"

enum { LINE = 16, KEYS = 64, QUERIES = 12, MAX_DIM = 256 }; /* KEYS: a multiple of TILE_OUTPUTS */

typedef struct {
    const float *query;
    float *out;
    int position;
    float best, total;
    float sum[MAX_DIM];
} Query;

static void score(Query *queries, int count, const float *const *keys, int num_keys, int dim,
                  float (*scores)[KEYS]) {
    for (int q = 0, tile; q < count; q += tile) {
        tile = tile_of(count - q);
        const float *rows[TILE_ROWS];
        for (int i = 0; i < tile; i++) rows[i] = queries[q + i].query;
        for (int t = 0; t < num_keys; t += TILE_OUTPUTS) {
            const float *four[TILE_OUTPUTS];
            for (int i = 0; i < TILE_OUTPUTS; i++) four[i] = keys[t + i < num_keys ? t + i : t];
            vec sums[TILE_ROWS][TILE_OUTPUTS] = {0};
            multiply_rows(four, rows, dim, sums, tile);
            for (int i = 0; i < tile; i++) sum_four(sums[i], &scores[q + i][t]);
        }
    }
}

static float largest(const float *scores) {
    vec best = *(const vec *)scores;
    for (int t = LANES; t < KEYS; t += LANES) {
        vec next = *(const vec *)(scores + t);
        ints is_larger = next > best;
        best = (vec)((is_larger & (ints)next) | (~is_larger & (ints)best));
    }
    float found = best[0];
    for (int i = 1; i < LANES; i++) found = best[i] > found ? best[i] : found;
    return found;
}

/* Turn scores into weights: 0 where the query may not attend, then the running softmax. Return 0 if all are 0. */
static int weigh(Query *query, float *restrict scores, int first, int num_keys, const Heads *shape) {
    int begin = 0, end = query->position + 1 - first;
    if (end > num_keys) end = num_keys;
    if (shape->window && query->position - shape->window + 1 > first) begin = query->position - shape->window + 1 - first;
    if (begin >= end) return 0;
    for (int t = begin; t < end; t++) scores[t] *= shape->scale;
    if (shape->softcap > 0)
        for (int t = begin; t < end; t++) scores[t] = shape->softcap * tanhf(scores[t] / shape->softcap);
    for (int t = 0; t < begin; t++) scores[t] = -INFINITY;
    for (int t = end; t < KEYS; t++) scores[t] = -INFINITY;
    float best = largest(scores);
    if (best < query->best) best = query->best;
    for (int t = 0; t < KEYS; t++) scores[t] = exp_negative(scores[t] - best);
    vec total = {0};
    for (int t = 0; t < KEYS; t += LANES) total += *(const vec *)(scores + t);
    float keep = query->best == -INFINITY ? 0.0f : exp_negative(query->best - best);
    for (int d = 0; d < shape->dim; d++) query->sum[d] *= keep;
    query->total = query->total * keep + sum_lanes(total);
    query->best = best;
    return 1;
}

static inline __attribute__((always_inline)) void add_some(Query *query, const float *restrict weights,
                                                           const float *const *values, int num_keys, int d,
                                                           const int vectors) {
    vec s[4];
    for (int i = 0; i < vectors; i++) s[i] = *(vec *)(query->sum + d + i * LANES);
    for (int t = 0; t < num_keys; t++)
        for (int i = 0; i < vectors; i++)
            s[i] = fma_lanes(all_lanes(weights[t]), *(const vec *)(values[t] + d + i * LANES), s[i]);
    for (int i = 0; i < vectors; i++) *(vec *)(query->sum + d + i * LANES) = s[i];
}

static void add_values(Query *query, const float *restrict weights, const float *const *values, int num_keys, int dim) {
    int d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) add_some(query, weights, values, num_keys, d, 4);
    for (; d < dim; d += LANES) add_some(query, weights, values, num_keys, d, 1);
}

/* Prefetch the first keys of a head: blocks are too short for the processor to detect a stream in them. */
static void fetch_keys(const Heads *shape, const Cache *cache, const Tile *tile, int kv_head) {
    const float *head_keys = cache->keys + kv_head * cache->slots * shape->dim;
    int first = 0, last = tile->start + tile->rows;
    if (shape->window && tile->start >= shape->window) first = (tile->start - shape->window + 1) / KEYS * KEYS;
    if (last > first + KEYS) last = first + KEYS;
    for (int token = first; token < last; token += cache->block_size) {
        const float *block = head_keys + (int64_t)tile->blocks[token / cache->block_size] * cache->block_size * shape->dim;
        int tokens = last - token < cache->block_size ? last - token : cache->block_size;
        for (int at = 0; at < tokens * shape->dim; at += LINE) __builtin_prefetch(block + at);
    }
}

static void attend(const Heads *shape, const Cache *cache, const int32_t *blocks, int kv_head, Query *queries, int count) {
    const float *head_keys = cache->keys + kv_head * cache->slots * shape->dim;
    const float *head_values = cache->values + kv_head * cache->slots * shape->dim;
    int last = queries[count - 1].position, first = 0;
    if (shape->window && queries[0].position >= shape->window)
        first = (queries[0].position - shape->window + 1) / KEYS * KEYS;
    float scores[QUERIES][KEYS];
    const float *keys[KEYS], *values[KEYS];
    for (; first <= last; first += KEYS) {
        int num_keys = last + 1 - first < KEYS ? last + 1 - first : KEYS;
        for (int t = 0; t < num_keys; t++) {
            int token = first + t;
            int64_t slot = (int64_t)blocks[token / cache->block_size] * cache->block_size + token % cache->block_size;
            keys[t] = head_keys + slot * shape->dim;
            values[t] = head_values + slot * shape->dim;
            for (int d = 0; d < shape->dim; d += LINE) __builtin_prefetch(values[t] + d);
        }
        score(queries, count, keys, num_keys, shape->dim, scores);
        for (int q = 0; q < count; q++)
            if (weigh(&queries[q], scores[q], first, num_keys, shape))
                add_values(&queries[q], scores[q], values, num_keys, shape->dim);
    }
}

/* Attend with query [heads, rows, dim], by strides, over each row's own past -> out [rows, heads, dim]. A tile's rows
 * times the heads of a group are computed at most 12 at a time. */
void attention(const Heads *shape, const Cache *cache, const Tile *tiles, int count, const float *query,
               int64_t head_stride, int64_t row_stride, float *out) {
    int group = shape->heads / shape->kv_heads, dim = shape->dim;
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (int i = 0; i < count; i++) {
        for (int kv = 0; kv < shape->kv_heads; kv++) {
            const Tile *tile = &tiles[i];
            int pairs = tile->rows * group;
            if (kv + 1 < shape->kv_heads)
                fetch_keys(shape, cache, tile, kv + 1);
            else if (i + 1 < count)
                fetch_keys(shape, cache, tile + 1, 0);
            for (int first = 0; first < pairs; first += QUERIES) {
                Query queries[QUERIES];
                int taken = pairs - first < QUERIES ? pairs - first : QUERIES;
                for (int q = 0; q < taken; q++) {
                    int64_t row = tile->row + (first + q) / group, head = kv * group + (first + q) % group;
                    queries[q].query = query + head * head_stride + row * row_stride;
                    queries[q].out = out + (row * shape->heads + head) * dim;
                    queries[q].position = tile->start + (first + q) / group;
                    queries[q].best = -INFINITY;
                    queries[q].total = 0;
                    memset(queries[q].sum, 0, dim * sizeof(float));
                }
                attend(shape, cache, tile->blocks, kv, queries, taken);
                for (int q = 0; q < taken; q++)
                    for (int d = 0; d < dim; d++) queries[q].out[d] = queries[q].sum[d] / queries[q].total;
            }
        }
    }
}
