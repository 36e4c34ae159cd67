/* All decoder layers of a Llama-like model in one call: norm, q/k/v, rotary embedding, attention, output, norm, gated
 * MLP, each with the adapters' updates, in fp32. */
#include "kernels.h"

static int project(const Matrix *matrix, int group, const Step *step, const float *x, float *y) {
    matmul(matrix, x, matrix->in, y, matrix->out, step->rows);
    if (!step->num_segments) return 0;
    return low_rank_updates(step->segments, step->num_segments, group, x, matrix->in, y, matrix->out, 0, matrix->in,
                            matrix->out, matrix->bias);
}

/* Rotary embedding (arXiv 2104.09864), with the halves of a head as the pairs, as in Llama. */
static void rotate(float *restrict x, const float *restrict cosine, const float *restrict sine, int dim) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = FMA(a, cosine[i], -(b * sine[i]));
        x[i + half] = FMA(b, cosine[i + half], a * sine[i + half]);
    }
}

static void rotate_and_cache(const Shape *shape, const Layer *layer, const Step *step, float *qkv) {
    const Heads *h = &shape->heads;
    int dim = h->dim, width = (h->heads + 2 * h->kv_heads) * dim;
#pragma omp parallel for schedule(static) if (step->rows > 16)
    for (int i = 0; i < step->num_tiles; i++) {
        const Tile *tile = &step->tiles[i];
        for (int r = 0; r < tile->rows; r++) {
            int64_t row = tile->row + r, token = tile->start + r;
            int64_t slot = (int64_t)tile->blocks[token / shape->block_size] * shape->block_size + token % shape->block_size;
            float *mine = qkv + row * width;
            const float *keys = mine + h->heads * dim, *values = keys + h->kv_heads * dim;
            if (layer->query_norm) {
                rms_norm(mine, layer->query_norm, mine, 0, h->heads, dim, shape->eps);
                rms_norm(keys, layer->key_norm, (float *)keys, 0, h->kv_heads, dim, shape->eps);
            }
            for (int head = 0; head < h->heads + h->kv_heads; head++)
                rotate(mine + head * dim, step->cosine + row * dim, step->sine + row * dim, dim);
            for (int head = 0; head < h->kv_heads; head++) {
                int64_t at = (head * shape->slots + slot) * dim;
                memcpy(layer->keys + at, keys + head * dim, dim * sizeof(float));
                memcpy(layer->values + at, values + head * dim, dim * sizeof(float));
            }
        }
    }
}

static void add(float *restrict to, const float *restrict from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

/* Compute gate_up [rows, 2 * width] -> silu(gate) * up, in place of the first half, rows `width` apart. */
static void gate(const float *gate_up, float *out, int rows, int width) {
#pragma omp parallel for schedule(static) if (rows > 16)
    for (int row = 0; row < rows; row++) {
        const float *restrict gates = gate_up + (int64_t)row * 2 * width, *restrict ups = gates + width;
        float *restrict to = out + (int64_t)row * width;
        for (int i = 0; i < width; i++) {
            float small = exp_negative(gates[i] < 0 ? gates[i] : -gates[i]);
            float sigmoid = (gates[i] < 0 ? small : 1.0f) / (1.0f + small);
            to[i] = gates[i] * sigmoid * ups[i];
        }
    }
}

/* Run all layers in place on hidden [rows, hidden]; `room` is scratch space of rows * (hidden + max(heads * dim + qkv
 * width, 3 * intermediate)) floats. */
int run_layers(const Shape *shape, const Layer *layers, int num_layers, const Step *step, float *hidden, float *room) {
    int rows = step->rows, width = shape->hidden;
    float *normed = room, *wide = room + (int64_t)rows * width;
    for (int i = 0; i < num_layers; i++) {
        const Layer *layer = &layers[i];
        float *attended = wide + (int64_t)rows * layer->qkv.out;
        rms_norm(hidden, layer->input_norm, normed, 0, rows, width, shape->eps);
        if (project(&layer->qkv, layer->qkv_group, step, normed, wide)) return -1;
        rotate_and_cache(shape, layer, step, wide);
        Heads heads = shape->heads;
        heads.window = layer->window;
        Cache cache = {layer->keys, layer->values, shape->slots, shape->block_size};
        attention(&heads, &cache, step->tiles, step->num_tiles, wide, heads.dim, layer->qkv.out, attended);
        if (project(&layer->output, layer->output_group, step, attended, normed)) return -1;
        add(hidden, normed, (int64_t)rows * width);

        float *gated = wide + (int64_t)rows * layer->gate_up.out;
        rms_norm(hidden, layer->post_norm, normed, 0, rows, width, shape->eps);
        if (project(&layer->gate_up, layer->gate_up_group, step, normed, wide)) return -1;
        gate(wide, gated, rows, shape->intermediate);
        if (project(&layer->down, layer->down_group, step, gated, normed)) return -1;
        add(hidden, normed, (int64_t)rows * width);
    }
    return 0;
}
