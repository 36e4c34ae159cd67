/* Low-rank updates of rows that belong to different adapters:
 *
 *     y += scale * s B A x                                  LoRA, arXiv 2106.09685, section 4.1
 *     y += scale * ((m / |W + s B A| - 1) W x + m / |W + s B A| * s B A x)     DoRA, arXiv 2402.09353, equation 5
 */
#include "kernels.h"

enum { ITEM_ROWS = 6, MAX_RANK = 1024, PANEL = 512 };

/* hidden [rows, rank] = x A^T */
static void shrink(const Part *part, const float *x, int in, int rows, float (*hidden)[MAX_RANK]) {
    float room[TILE_OUTPUTS][PANEL] __attribute__((aligned(64)));
    for (int rank = 0; rank < part->rank; rank += TILE_OUTPUTS) {
        vec sums[ITEM_ROWS][TILE_OUTPUTS] = {0};
        for (int k = 0; k < in; k += PANEL) {
            int n = in - k < PANEL ? in - k : PANEL;
            const float *w[TILE_OUTPUTS];
            for (int o = 0; o < TILE_OUTPUTS; o++) {
                int64_t at = (int64_t)(rank + o < part->rank ? rank + o : rank) * in + k;
                if (part->is_bf16) widen(room[o], (const bf16 *)part->a + at, n);
                w[o] = part->is_bf16 ? room[o] : (const float *)part->a + at;
            }
            for (int r = 0, tile; r < rows; r += tile) {
                tile = tile_of(rows - r);
                const float *at[TILE_ROWS];
                for (int i = 0; i < tile; i++) at[i] = x + (int64_t)(r + i) * in + k;
                multiply_rows(w, at, n, &sums[r], tile);
            }
        }
        for (int r = 0; r < rows; r++) {
            float four[TILE_OUTPUTS];
            sum_four(sums[r], four);
            for (int o = 0; o < TILE_OUTPUTS && rank + o < part->rank; o++) hidden[r][rank + o] = part->scaling * four[o];
        }
    }
}

/* y [out] += h[0] b[0] + ... + h[3] b[3], eight columns at a time. */
#define ADD_FOUR_RANKS(TYPE, EIGHT, ONE)                                                                              \
    for (int o = 0; o + LANES <= out; o += LANES) {                                                                   \
        vec sum = *(vec *)(y + o);                                                                                    \
        for (int i = 0; i < 4; i++) sum = fma_eight(all_lanes(h[i]), EIGHT((const TYPE *)b[i] + o), sum);             \
        *(vec *)(y + o) = sum;                                                                                        \
    }                                                                                                                 \
    for (int o = out / LANES * LANES; o < out; o++)                                                                   \
        for (int i = 0; i < 4; i++) y[o] = FMA(h[i], ONE(((const TYPE *)b[i])[o]), y[o]);
#define AS_IS(value) (value)

static inline vec eight_floats(const float *from) {
    return *(const vec *)from;
}

static inline vec eight_bf16(const bf16 *from) {
    float found[LANES];
    widen(found, from, LANES);
    return *(const vec *)found;
}

/* y [out] += scale * B hidden */
static void expand(float *restrict y, const float *restrict hidden, float scale, const void *bt, int is_bf16, int rank,
                   int out) {
    int64_t row = (int64_t)out * (is_bf16 ? sizeof(bf16) : sizeof(float));
    for (int r = 0; r < rank; r += 4) {
        const void *b[4];
        float h[4];
        for (int i = 0; i < 4; i++) {
            b[i] = (const char *)bt + (r + i < rank ? r + i : r) * row;
            h[i] = r + i < rank ? scale * hidden[r + i] : 0.0f;
        }
        if (is_bf16) {
            ADD_FOUR_RANKS(bf16, eight_bf16, from_bf16)
        } else {
            ADD_FOUR_RANKS(float, eight_floats, AS_IS)
        }
    }
}

static void apply_part(const Part *part, float scale, const float *x, int in, const float *base, float *y, int width,
                       const float *bias, int rows) {
    float hidden[ITEM_ROWS][MAX_RANK];
    shrink(part, x, in, rows, hidden);
    for (int r = 0; r < rows; r++) {
        float *mine = y + (int64_t)r * width + part->offset;
        if (!part->magnitude) {
            expand(mine, hidden[r], scale, part->bt, part->is_bf16, part->rank, part->out);
            continue;
        }
        float update[part->out];
        memset(update, 0, sizeof update);
        expand(update, hidden[r], scale, part->bt, part->is_bf16, part->rank, part->out);
        const float *before = base + (int64_t)r * width + part->offset;
        for (int o = 0; o < part->out; o++) {
            float product = before[o] - (bias ? bias[part->offset + o] : 0.0f);
            mine[o] += scale * (part->magnitude[o] - 1.0f) * product + part->magnitude[o] * update[o];
        }
    }
}

static void read_rows(float *restrict to, const void *from, int64_t stride, int is_bf16, int rows, int width) {
    for (int r = 0; r < rows; r++)
        if (is_bf16)
            widen(to + (int64_t)r * width, (const bf16 *)from + r * stride, width);
        else
            memcpy(to + (int64_t)r * width, (const float *)from + r * stride, width * sizeof(float));
}

static void write_rows(void *to, const float *restrict from, int64_t stride, int is_bf16, int rows, int width) {
    for (int r = 0; r < rows; r++)
        if (is_bf16)
            for (int i = 0; i < width; i++) ((bf16 *)to)[r * stride + i] = to_bf16(from[(int64_t)r * width + i]);
        else
            memcpy((float *)to + r * stride, from + (int64_t)r * width, width * sizeof(float));
}

static int has_parts(const Segment *chain, int group) {
    for (int s = 0; s < chain->chain; s++)
        if (chain[s].groups[group].count) return 1;
    return 0;
}

static void update_rows(const Segment *chain, int group, const void *x, int64_t x_stride, void *y, int64_t y_stride,
                        int is_bf16, int in, int out, const float *bias, int first, int rows) {
    int size = is_bf16 ? sizeof(bf16) : sizeof(float);
    const char *x_rows = (const char *)x + first * x_stride * size;
    char *y_rows = (char *)y + first * y_stride * size;
    float input[rows * in], sums[rows * out], base[rows * out];
    read_rows(input, x_rows, x_stride, is_bf16, rows, in);
    read_rows(sums, y_rows, y_stride, is_bf16, rows, out);
    memcpy(base, sums, sizeof base);
    for (int s = 0; s < chain->chain; s++) {
        const Parts *parts = &chain[s].groups[group];
        for (int p = 0; p < parts->count; p++)
            apply_part(&parts->parts[p], chain[s].scale, input, in, base, sums, out, bias, rows);
    }
    write_rows(y_rows, sums, y_stride, is_bf16, rows, out);
}

/* Apply every segment's parts of `group` to y [rows, out] from x [rows, in]; both bf16 or both fp32, rows `x_stride`
 * and `y_stride` numbers apart. `bias` is what y already contains beside W x. */
void low_rank_updates(const Segment *segments, int count, int group, const void *x, int64_t x_stride, void *y,
                      int64_t y_stride, int is_bf16, int in, int out, const float *bias) {
    int items = 0;
    for (int s = 0; s < count; s++)
        if (segments[s].chain) items += (segments[s].end - segments[s].start + ITEM_ROWS - 1) / ITEM_ROWS;
#pragma omp parallel for schedule(dynamic, 1) if (items > 1)
    for (int item = 0; item < items; item++) {
        int before = 0;
        for (int s = 0; s < count; s++) {
            if (!segments[s].chain) continue;
            int mine = (segments[s].end - segments[s].start + ITEM_ROWS - 1) / ITEM_ROWS;
            if (item < before + mine) {
                int first = segments[s].start + (item - before) * ITEM_ROWS;
                int rows = segments[s].end - first < ITEM_ROWS ? segments[s].end - first : ITEM_ROWS;
                if (has_parts(&segments[s], group))
                    update_rows(&segments[s], group, x, x_stride, y, y_stride, is_bf16, in, out, bias, first, rows);
                break;
            }
            before += mine;
        }
    }
}
