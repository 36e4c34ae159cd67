/* Low-rank updates of rows that belong to different adapters:
 *
 *     y += scale * s B A x                                  LoRA, arXiv 2106.09685, section 4.1
 *     y += scale * ((m / |W + s B A| - 1) W x + m / |W + s B A| * s B A x)     DoRA, arXiv 2402.09353, equation 5
 */
#include <stdlib.h>

#include "kernels.h"

enum { RANKS = 8, ITEM_ROWS = 6, MAX_RANK = 1024, PANEL = 512 };

static inline vec lanes_of_floats(const float *from) {
    return *(const vec *)from;
}

/* One row, rank after rank. Halves of adapters are stored in the order in which they are read here, which is the fastest
 * order for memory (Zen 5, 32 rows on 32 adapters of rank 16, all layers: 20 ms instead of 28). */
#define ADD_PRODUCTS(TYPE, LANES_OF)                                                                                  \
    for (int k = 0; k < in; k += LANES) sum = fma_lanes(*(const vec *)(x + k), LANES_OF((const TYPE *)a + k), sum);

static void shrink_row(const Part *part, const float *x, int in, float *hidden) {
    const char *a = part->a;
    for (int rank = 0; rank < part->rank; rank += TILE_OUTPUTS) {
        vec sums[TILE_OUTPUTS] = {0};
        int ranks = part->rank - rank < TILE_OUTPUTS ? part->rank - rank : TILE_OUTPUTS;
        for (int o = 0; o < ranks; o++, a += in * (part->a_is_bf16 ? sizeof(bf16) : sizeof(float))) {
            vec sum = {0};
            if (part->a_is_bf16) {
                ADD_PRODUCTS(bf16, lanes_of_bf16)
            } else {
                ADD_PRODUCTS(float, lanes_of_floats)
            }
            sums[o] = sum;
        }
        float four[TILE_OUTPUTS];
        sum_four(sums, four);
        for (int o = 0; o < ranks; o++) hidden[rank + o] = part->scaling * four[o];
    }
}

/* Compute hidden [rows, rank] = x A^T. */
static void shrink(const Part *part, const float *x, int64_t x_stride, int in, int rows, float (*hidden)[MAX_RANK]) {
    float room[TILE_OUTPUTS][PANEL] __attribute__((aligned(64)));
    for (int rank = 0; rank < part->rank; rank += TILE_OUTPUTS) {
        vec sums[ITEM_ROWS][TILE_OUTPUTS] = {0};
        for (int k = 0; k < in; k += PANEL) {
            int n = in - k < PANEL ? in - k : PANEL;
            const float *w[TILE_OUTPUTS];
            for (int o = 0; o < TILE_OUTPUTS; o++) {
                int64_t at = (int64_t)(rank + o < part->rank ? rank + o : rank) * in + k;
                if (part->a_is_bf16) widen(room[o], (const bf16 *)part->a + at, n);
                w[o] = part->a_is_bf16 ? room[o] : (const float *)part->a + at;
            }
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
            for (int o = 0; o < TILE_OUTPUTS && rank + o < part->rank; o++) hidden[r][rank + o] = part->scaling * four[o];
        }
    }
}

/* Add h[0] b[0] + h[1] b[1] + ... to y [out], rank by rank, a vector of columns at a time. */
#define ADD_RANKS(TYPE, LANES_OF, ONE)                                                                                \
    for (int o = 0; o + LANES <= out; o += LANES) {                                                                   \
        vec sum = *(vec *)(y + o);                                                                                    \
        for (int i = 0; i < ranks; i++) sum = fma_lanes(all_lanes(h[i]), LANES_OF((const TYPE *)b[i] + o), sum);      \
        *(vec *)(y + o) = sum;                                                                                        \
    }                                                                                                                 \
    for (int o = out / LANES * LANES; o < out; o++)                                                                   \
        for (int i = 0; i < ranks; i++) y[o] = FMA(h[i], ONE(((const TYPE *)b[i])[o]), y[o]);
#define AS_IS(value) (value)

static inline __attribute__((always_inline)) void add_ranks(float *restrict y, const float *restrict hidden, float scale,
                                                            const Part *part, const int ranks) {
    int out = part->out;
    int64_t row = (int64_t)out * (part->bt_is_bf16 ? sizeof(bf16) : sizeof(float));
    for (int r = 0; r < part->rank; r += ranks) {
        const void *b[RANKS];
        float h[RANKS];
        for (int i = 0; i < ranks; i++) {
            b[i] = (const char *)part->bt + (r + i < part->rank ? r + i : r) * row;
            h[i] = r + i < part->rank ? scale * hidden[r + i] : 0.0f;
        }
        if (part->bt_is_bf16) {
            ADD_RANKS(bf16, lanes_of_bf16, from_bf16)
        } else {
            ADD_RANKS(float, lanes_of_floats, AS_IS)
        }
    }
}

/* Add scale * B hidden to y [out]. A single row reads B from beginning to end, several rows a few ranks at a time. */
static void expand(float *restrict y, const float *restrict hidden, float scale, const Part *part, int rows) {
    if (rows == 1)
        add_ranks(y, hidden, scale, part, 1);
    else
        add_ranks(y, hidden, scale, part, RANKS);
}

/* For DoRA only: `base` is y before the first adapter, [rows, width]; `update` is scratch space for [part->out]. */
static void apply_part(const Part *part, float scale, const float *x, int64_t x_stride, int in, const float *base,
                       float *restrict update, float *y, int64_t y_stride, int width, const float *bias, int rows) {
    float hidden[ITEM_ROWS][MAX_RANK];
    if (rows == 1)
        shrink_row(part, x, in, hidden[0]);
    else
        shrink(part, x, x_stride, in, rows, hidden);
    for (int r = 0; r < rows; r++) {
        float *mine = y + r * y_stride + part->offset;
        if (!part->magnitude) {
            expand(mine, hidden[r], scale, part, rows);
            continue;
        }
        memset(update, 0, part->out * sizeof(float));
        expand(update, hidden[r], scale, part, rows);
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

static int has_parts(const Segment *chain, int group) {
    for (int s = 0; s < chain->chain; s++)
        if (chain[s].groups[group].count) return 1;
    return 0;
}

static int needs_base(const Segment *chain, int group) {
    for (int s = 0; s < chain->chain; s++)
        for (int p = 0; p < chain[s].groups[group].count; p++)
            if (chain[s].groups[group].parts[p].magnitude) return 1;
    return 0;
}

/* Scratch space of `update_rows`, in floats. It is not on the stack, where a head's columns would not fit. */
static int64_t room_for(const Segment *segments, int count, int group, int is_bf16, int in, int out) {
    int64_t floats = is_bf16 ? ITEM_ROWS * ((int64_t)in + out) : 0;
    for (int s = 0; s < count; s++)
        if (segments[s].chain && needs_base(&segments[s], group)) return floats + (ITEM_ROWS + 1) * (int64_t)out;
    return floats;
}

static void update_floats(const Segment *chain, int group, const float *x, int64_t x_stride, float *y, int64_t y_stride,
                          int in, int out, const float *bias, int rows, float *room) {
    float *update = room, *base = room ? room + out : 0;
    if (needs_base(chain, group)) read_rows(base, y, y_stride, 0, rows, out);
    for (int s = 0; s < chain->chain; s++) {
        const Parts *parts = &chain[s].groups[group];
        for (int p = 0; p < parts->count; p++)
            apply_part(&parts->parts[p], chain[s].scale, x, x_stride, in, base, update, y, y_stride, out, bias, rows);
    }
}

static void update_rows(const Segment *chain, int group, const void *x, int64_t x_stride, void *y, int64_t y_stride,
                        int is_bf16, int in, int out, const float *bias, int first, int rows, float *room) {
    if (!is_bf16) {
        update_floats(chain, group, (const float *)x + first * x_stride, x_stride, (float *)y + first * y_stride, y_stride,
                      in, out, bias, rows, room);
        return;
    }
    bf16 *y_rows = (bf16 *)y + first * y_stride;
    float *input = room, *sums = room + (int64_t)rows * in;
    read_rows(input, (const bf16 *)x + first * x_stride, x_stride, 1, rows, in);
    read_rows(sums, y_rows, y_stride, 1, rows, out);
    update_floats(chain, group, input, in, sums, out, in, out, bias, rows, sums + (int64_t)rows * out);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < out; i++) y_rows[r * y_stride + i] = to_bf16(sums[(int64_t)r * out + i]);
}

static int items_of(const Segment *segment) {
    return (segment->end - segment->start + ITEM_ROWS - 1) / ITEM_ROWS;
}

/* Apply every segment's parts of `group` to y [rows, out] from x [rows, in]; both bf16 or both fp32, rows `x_stride`
 * and `y_stride` numbers apart. `bias` is what y has beside W x. */
int low_rank_updates(const Segment *segments, int count, int group, const void *x, int64_t x_stride, void *y,
                     int64_t y_stride, int is_bf16, int in, int out, const float *bias) {
    int items = 0, has_failed = 0;
    for (int s = 0; s < count; s++)
        if (segments[s].chain) items += items_of(&segments[s]);
    int64_t floats = room_for(segments, count, group, is_bf16, in, out);
#pragma omp parallel if (items > 1)
    {
        float *room = floats ? malloc(floats * sizeof(float)) : 0;
        if (floats && !room) {
#pragma omp atomic write
            has_failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < items; item++) {
            if (floats && !room) continue;
            int s = 0, before = 0;
            while (!segments[s].chain || item >= before + items_of(&segments[s])) {
                if (segments[s].chain) before += items_of(&segments[s]);
                s++;
            }
            int first = segments[s].start + (item - before) * ITEM_ROWS;
            int rows = segments[s].end - first < ITEM_ROWS ? segments[s].end - first : ITEM_ROWS;
            if (has_parts(&segments[s], group))
                update_rows(&segments[s], group, x, x_stride, y, y_stride, is_bf16, in, out, bias, first, rows, room);
        }
        free(room);
    }
    return -has_failed;
}
