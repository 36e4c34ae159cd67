/* The kernels of serve/csrc against plain sums in double precision, on buffers of exactly the size that each needs: with
 * AddressSanitizer a read or write beside them ends the program. Prints what it was compiled for. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels.h"

const char *vectors(void);
int has_threads(void);

static uint32_t state = 1;
static int failures = 0;

static double random_number(void) { /* -1 to 1 */
    state = state * 1664525u + 1013904223u;
    return (int32_t)state / 2147483648.0;
}

static void *room_for(int64_t bytes) {
    void *found = malloc(bytes);
    if (!found) abort();
    return found;
}

static float *floats(int64_t n) {
    float *found = room_for(n * sizeof(float));
    for (int64_t i = 0; i < n; i++) found[i] = (float)random_number();
    return found;
}

/* Numbers kept in either dtype, and as double. */
typedef struct {
    void *kept;
    double *numbers;
} Numbers;

static Numbers numbers_of(int64_t n, int is_bf16) {
    Numbers found = {floats(n), room_for(n * sizeof(double))};
    float *wide = found.kept;
    bf16 *half = is_bf16 ? room_for(n * sizeof(bf16)) : 0;
    for (int64_t i = 0; i < n; i++) {
        if (is_bf16) wide[i] = from_bf16(half[i] = to_bf16(wide[i]));
        found.numbers[i] = wide[i];
    }
    if (is_bf16) {
        free(wide);
        found.kept = half;
    }
    return found;
}

static void release(Numbers numbers) {
    free(numbers.kept);
    free(numbers.numbers);
}

static double at(const void *numbers, int64_t i, int is_bf16) {
    return is_bf16 ? from_bf16(((const bf16 *)numbers)[i]) : ((const float *)numbers)[i];
}

/* `size`: of the terms that were summed up. */
static void expect(const char *what, double found, double wanted, double size, double tolerance) {
    if (fabs(found - wanted) <= tolerance * (size + 1e-3)) return; /* NaN is no pass */
    if (failures++ < 20) fprintf(stderr, "%s: %.9g, expected %.9g\n", what, found, wanted);
}

static void same_bits(const char *what, const float *a, const float *b, int64_t n) {
    if (!memcmp(a, b, n * sizeof(float))) return;
    if (failures++ < 20) fprintf(stderr, "%s: other bits than in company\n", what);
}

/* A matrix of any kind, and its weights as double [out, in]. */
static Matrix matrix_of(int kind, int block, int in, int out, int has_bias, double **dense) {
    int64_t n = (int64_t)in * out;
    Matrix m = {.kind = kind, .in = in, .out = out, .block = block, .bias = has_bias ? floats(out) : 0};
    if (kind != MATRIX_NF4) {
        Numbers weights = numbers_of(n, kind == MATRIX_BF16);
        m.weights = weights.kept;
        *dense = weights.numbers;
        return m;
    }
    uint8_t *codes = room_for(n / 2);
    float *absmax = floats(n / block), *book = floats(16);
    for (int64_t i = 0; i < n / 2; i++) codes[i] = (uint8_t)(state = state * 1664525u + 1013904223u, state >> 24);
    *dense = room_for(n * sizeof(double));
    for (int64_t i = 0; i < n; i++)
        (*dense)[i] = (double)book[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax[i / block];
    m.weights = codes, m.absmax = absmax, m.book = book;
    return m;
}

static void release_matrix(Matrix m, double *dense) {
    free((void *)m.weights), free((void *)m.absmax), free((void *)m.book), free((void *)m.bias), free(dense);
}

static void check_product(int kind, int block, int in, int out, int rows) {
    double *dense;
    Matrix m = matrix_of(kind, block, in, out, out % 2, &dense);
    float *x = floats((int64_t)rows * in), *y = floats((int64_t)rows * out), *alone = floats(out);
    matmul(&m, x, in, y, out, rows);
    for (int r = 0; r < rows; r++) {
        for (int o = 0; o < out; o++) {
            double sum = m.bias ? m.bias[o] : 0, size = fabs(sum);
            for (int k = 0; k < in; k++) {
                double term = x[(int64_t)r * in + k] * dense[(int64_t)o * in + k];
                sum += term, size += fabs(term);
            }
            expect("matmul", y[(int64_t)r * out + o], sum, size, 2e-6);
        }
        if (r % 7 == 0) {
            float *row = room_for(in * sizeof(float));
            memcpy(row, x + (int64_t)r * in, in * sizeof(float));
            matmul(&m, row, in, alone, out, 1);
            same_bits("matmul", alone, y + (int64_t)r * out, out);
            free(row);
        }
    }
    free(x), free(y), free(alone);
    release_matrix(m, dense);
}

static void check_products(void) {
    static const int rows[] = {0, 1, 2, 3, 4, 5, 7, 16, 17, 49}, outs[] = {1, 3, 16, 21};
    for (int o = 0; o < 4; o++)
        for (int r = 0; r < 10; r++) {
            check_product(MATRIX_FP32, 0, 16 + 48 * (r % 3), outs[o], rows[r]);
            check_product(MATRIX_BF16, 0, r % 2 ? 128 : 48, outs[o], rows[r]);
            check_product(MATRIX_NF4, 32, r % 2 ? 96 : 800, outs[o], rows[r]);
            check_product(MATRIX_NF4, 64, r % 2 ? 64 : 832, outs[o], rows[r]);
        }
    for (int block = 128; block <= 4096; block *= 2)
        for (int r = 1; r < 8; r += 2) check_product(MATRIX_NF4, block, block < 512 ? 1536 : 3 * block, 5, rows[r]);
}

enum { IN = 48, OUT = 30, WIDTH = 50, ROWS = 20 };

static Part part_of(int rank, int a_is_bf16, int bt_is_bf16, int is_dora, int offset, Numbers *halves) {
    halves[0] = numbers_of((int64_t)rank * IN, a_is_bf16);
    halves[1] = numbers_of((int64_t)rank * OUT, bt_is_bf16);
    return (Part){halves[0].kept, halves[1].kept, is_dora ? floats(OUT) : 0, 0.7f, rank, OUT, offset, a_is_bf16, bt_is_bf16};
}

/* Rows 2..5 have one adapter, 5..15 a chain of two, 15 alone one, the rest none. */
static void check_update(int rank, int is_bf16, int dtypes, int is_dora) {
    Numbers halves[3][2], x = numbers_of(ROWS * IN, is_bf16), y = numbers_of(ROWS * WIDTH, is_bf16);
    static const int ranks_less[] = {0, 0, 1};
    static const struct { int part, start, end, chain; float scale; } plan[] = {
        {0, 2, 5, 1, 0.5f}, {1, 5, 15, 2, 1.0f}, {2, 5, 15, 0, -0.25f}, {2, 15, 16, 1, 1.5f}, {0, 17, 17, 1, 1.0f}};
    Part parts[3];
    Parts groups[3][2];
    Segment segments[5];
    float *bias = floats(WIDTH);
    for (int i = 0; i < 3; i++) {
        int kind = (dtypes + i) % 4, fewer = rank > 1 ? ranks_less[i] : 0;
        parts[i] = part_of(rank - fewer, kind & 1, kind >> 1, is_dora, i ? 20 : 0, halves[i]);
        groups[i][0] = (Parts){0, 0}; /* of a group it does not change */
        groups[i][1] = (Parts){&parts[i], 1};
    }
    for (int s = 0; s < 5; s++)
        segments[s] = (Segment){groups[plan[s].part], plan[s].scale, plan[s].start, plan[s].end, plan[s].chain};
    double sizes[ROWS * WIDTH], *wanted = room_for(ROWS * WIDTH * sizeof(double));
    memcpy(wanted, y.numbers, ROWS * WIDTH * sizeof(double));
    for (int i = 0; i < ROWS * WIDTH; i++) sizes[i] = fabs(wanted[i]);
    for (int s = 0; s < 5; s++) {
        const Part *part = &parts[plan[s].part];
        const double *a = halves[plan[s].part][0].numbers, *bt = halves[plan[s].part][1].numbers;
        double *hidden = room_for(part->rank * sizeof(double)), *hidden_size = room_for(part->rank * sizeof(double));
        for (int r = plan[s].start; r < plan[s].end; r++) {
            for (int i = 0; i < part->rank; i++) {
                hidden[i] = hidden_size[i] = 0;
                for (int k = 0; k < IN; k++) {
                    double term = part->scaling * x.numbers[r * IN + k] * a[(int64_t)i * IN + k];
                    hidden[i] += term, hidden_size[i] += fabs(term);
                }
            }
            for (int o = 0; o < OUT; o++) {
                int to = r * WIDTH + part->offset + o;
                double found = 0, size = 0;
                for (int i = 0; i < part->rank; i++) {
                    found += hidden[i] * bt[(int64_t)i * OUT + o];
                    size += hidden_size[i] * fabs(bt[(int64_t)i * OUT + o]);
                }
                if (is_dora) {
                    double m = part->magnitude[o];
                    found = m * found + (m - 1) * (y.numbers[to] - bias[part->offset + o]);
                    size += fabs(y.numbers[to]) + fabs((double)bias[part->offset + o]);
                }
                wanted[to] += plan[s].scale * found;
                sizes[to] += fabs(plan[s].scale) * size;
            }
        }
        free(hidden), free(hidden_size);
    }
    if (low_rank_updates(segments, 5, 0, x.kept, IN, y.kept, WIDTH, is_bf16, IN, WIDTH, bias) ||
        low_rank_updates(segments, 5, 1, x.kept, IN, y.kept, WIDTH, is_bf16, IN, WIDTH, bias))
        abort();
    for (int i = 0; i < ROWS * WIDTH; i++)
        expect("low_rank_updates", at(y.kept, i, is_bf16), wanted[i], sizes[i], is_bf16 ? 1e-2 : 4e-6);
    for (int i = 0; i < 3; i++) release(halves[i][0]), release(halves[i][1]), free((void *)parts[i].magnitude);
    release(x), release(y), free(bias), free(wanted);
}

static void check_updates(void) {
    static const int ranks[] = {1, 2, 3, 4, 5, 8, 17, 1024};
    for (int r = 0; r < 8; r++)
        for (int dtypes = 0; dtypes < 4; dtypes++)
            for (int is_dora = 0; is_dora < 2; is_dora++)
                for (int is_bf16 = 0; is_bf16 < 2; is_bf16++) check_update(ranks[r], is_bf16, dtypes, is_dora);
}

/* What one head of one row sees, in double. */
static void attend_plainly(const Heads *h, const Cache *cache, const int32_t *blocks, int position, int kv_head,
                           const float *query, double *out) {
    double best = -INFINITY, total = 0, *scores = room_for((position + 1) * sizeof(double));
    int first = h->window && position - h->window + 1 > 0 ? position - h->window + 1 : 0;
    for (int pass = 0; pass < 2; pass++)
        for (int t = first; t <= position; t++) {
            int64_t slot = (int64_t)blocks[t / cache->block_size] * cache->block_size + t % cache->block_size;
            const float *key = cache->keys + (kv_head * cache->slots + slot) * h->dim;
            const float *value = cache->values + (kv_head * cache->slots + slot) * h->dim;
            if (pass == 0) {
                double score = 0;
                for (int d = 0; d < h->dim; d++) score += (double)query[d] * key[d];
                score *= h->scale;
                scores[t] = h->softcap > 0 ? h->softcap * tanh(score / h->softcap) : score;
                if (scores[t] > best) best = scores[t];
                continue;
            }
            double weight = exp(scores[t] - best);
            total += weight;
            for (int d = 0; d < h->dim; d++) out[d] = (t == first ? 0 : out[d]) + weight * value[d];
        }
    for (int d = 0; d < h->dim; d++) out[d] /= total;
    free(scores);
}

enum { TILES = 4 };

/* A prompt's beginning, a later chunk of it, and two rows that decode, each sequence in blocks of its own. */
static int make_tiles(int block_size, Tile *tiles, int32_t *blocks, int *num_blocks) {
    static const int starts[TILES] = {0, 63, 0, 130}, rows[TILES] = {4, 3, 1, 1};
    int row = 0, used = 0;
    for (int i = 0; i < TILES; i++) {
        int needed = (starts[i] + rows[i] + block_size - 1) / block_size;
        tiles[i] = (Tile){blocks + used, row, rows[i], starts[i]};
        for (int b = 0; b < needed; b++, used++) blocks[used] = used;
        row += rows[i];
    }
    for (int i = 0; i < used; i++) { /* shuffled */
        int32_t other = (int32_t)((uint32_t)(state = state * 1664525u + 1013904223u) % (uint32_t)used), kept = blocks[i];
        blocks[i] = blocks[other], blocks[other] = kept;
    }
    *num_blocks = used;
    return row;
}

static void check_attention(int dim, int heads, int kv_heads, int block_size, int window, float softcap) {
    Tile tiles[TILES];
    int32_t blocks[512];
    int num_blocks, rows = make_tiles(block_size, tiles, blocks, &num_blocks);
    int64_t slots = (int64_t)num_blocks * block_size;
    Heads h = {heads, kv_heads, dim, window, 0.3f, softcap};
    Cache cache = {floats(kv_heads * slots * dim), floats(kv_heads * slots * dim), slots, block_size};
    float *query = floats((int64_t)rows * heads * dim), *out = floats((int64_t)rows * heads * dim);
    double *wanted = room_for(dim * sizeof(double));
    attention(&h, &cache, tiles, TILES, query, dim, (int64_t)heads * dim, out);
    for (int i = 0; i < TILES; i++)
        for (int r = 0; r < tiles[i].rows; r++)
            for (int head = 0; head < heads; head++) {
                int64_t from = ((int64_t)(tiles[i].row + r) * heads + head) * dim;
                attend_plainly(&h, &cache, tiles[i].blocks, tiles[i].start + r, head / (heads / kv_heads), query + from, wanted);
                for (int d = 0; d < dim; d++) expect("attention", out[from + d], wanted[d], 1, 1e-5);
            }
    free(cache.keys), free(cache.values), free(query), free(out), free(wanted);
}

static void check_norm(int width, int rows, int is_bf16) {
    Numbers x = numbers_of((int64_t)rows * width, is_bf16), weight = numbers_of(width, is_bf16);
    void *y = room_for((int64_t)rows * width * (is_bf16 ? sizeof(bf16) : sizeof(float)));
    rms_norm(x.kept, weight.kept, y, is_bf16, rows, width, 1e-5f);
    for (int r = 0; r < rows; r++) {
        double squares = 0;
        for (int i = 0; i < width; i++) squares += x.numbers[r * width + i] * x.numbers[r * width + i];
        double factor = 1 / sqrt(squares / width + 1e-5);
        for (int i = 0; i < width; i++)
            expect("rms_norm", at(y, r * width + i, is_bf16), x.numbers[r * width + i] * factor * weight.numbers[i], 1,
                   is_bf16 ? 2e-2 : 2e-6);
    }
    release(x), release(weight), free(y);
}

static double *norm_plainly(const double *x, const float *weight, int width) {
    double squares = 0, *found = room_for(width * sizeof(double));
    for (int i = 0; i < width; i++) squares += x[i] * x[i];
    for (int i = 0; i < width; i++) found[i] = x[i] / sqrt(squares / width + 1e-5) * weight[i];
    return found;
}

static double *multiply_plainly(const Matrix *m, const double *dense, const double *x) {
    double *found = room_for(m->out * sizeof(double));
    for (int o = 0; o < m->out; o++) {
        found[o] = m->bias ? m->bias[o] : 0;
        for (int k = 0; k < m->in; k++) found[o] += dense[(int64_t)o * m->in + k] * x[k];
    }
    return found;
}

enum { HEADS = 4, KV_HEADS = 2, DIM = 16, HIDDEN = 64, INNER = 32, QKV = (HEADS + 2 * KV_HEADS) * DIM, BLOCK = 4 };

/* One layer on rows of a cache that already holds what came before; its own keys and values must land where told. */
static void check_layers(int kind, int has_norms, int window) {
    Tile tiles[TILES];
    int32_t blocks[512];
    int num_blocks, rows = make_tiles(BLOCK, tiles, blocks, &num_blocks);
    int64_t slots = (int64_t)num_blocks * BLOCK;
    double *dense[4];
    Layer layer = {
        matrix_of(kind, 32, HIDDEN, QKV, 1, &dense[0]), matrix_of(kind, 32, HEADS * DIM, HIDDEN, 0, &dense[1]),
        matrix_of(kind, 32, HIDDEN, 2 * INNER, 0, &dense[2]), matrix_of(kind, 32, INNER, HIDDEN, 0, &dense[3]),
        floats(HIDDEN), floats(HIDDEN), has_norms ? floats(DIM) : 0, has_norms ? floats(DIM) : 0,
        floats(KV_HEADS * slots * DIM), floats(KV_HEADS * slots * DIM), 0, 1, 2, 3, window};
    Shape shape = {{HEADS, KV_HEADS, DIM, 0, 0.25f, 0}, slots, HIDDEN, INNER, BLOCK, 1e-5f};
    float *cosine = floats(rows * DIM), *sine = floats(rows * DIM), *hidden = floats(rows * HIDDEN);
    double *states = room_for(rows * HIDDEN * sizeof(double)), *qkv[16], *attended = room_for(HEADS * DIM * sizeof(double));
    for (int i = 0; i < rows * HIDDEN; i++) states[i] = hidden[i];
    Step step = {tiles, 0, cosine, sine, rows, TILES, 0};
    int heads_room = HEADS * DIM + QKV, inner_room = 3 * INNER;
    float *room = floats((int64_t)rows * (HIDDEN + (heads_room > inner_room ? heads_room : inner_room)));
    if (run_layers(&shape, &layer, 1, &step, hidden, room)) abort();
    for (int r = 0; r < rows; r++) { /* queries, keys and values of every row */
        double *normed = norm_plainly(states + r * HIDDEN, layer.input_norm, HIDDEN);
        qkv[r] = multiply_plainly(&layer.qkv, dense[0], normed);
        for (int head = 0; head < HEADS + KV_HEADS; head++) {
            double *mine = qkv[r] + head * DIM, turned[DIM];
            if (has_norms) {
                double *own = norm_plainly(mine, head < HEADS ? layer.query_norm : layer.key_norm, DIM);
                memcpy(mine, own, sizeof turned);
                free(own);
            }
            for (int d = 0; d < DIM; d++)
                turned[d] = mine[d] * cosine[r * DIM + d] +
                            (d < DIM / 2 ? -mine[d + DIM / 2] : mine[d - DIM / 2]) * sine[r * DIM + d];
            memcpy(mine, turned, sizeof turned);
        }
        free(normed);
    }
    Heads heads = shape.heads;
    heads.window = window;
    Cache cache = {layer.keys, layer.values, slots, BLOCK};
    for (int i = 0; i < TILES; i++)
        for (int r = 0; r < tiles[i].rows; r++) {
            int row = tiles[i].row + r, token = tiles[i].start + r;
            int64_t slot = (int64_t)tiles[i].blocks[token / BLOCK] * BLOCK + token % BLOCK;
            for (int d = 0; d < KV_HEADS * DIM; d++) {
                int64_t to = (d / DIM * slots + slot) * DIM + d % DIM;
                expect("cached keys", layer.keys[to], qkv[row][HEADS * DIM + d], 10, 1e-5);
                expect("cached values", layer.values[to], qkv[row][(HEADS + KV_HEADS) * DIM + d], 10, 1e-5);
            }
            for (int head = 0; head < HEADS; head++) {
                float query[DIM];
                for (int d = 0; d < DIM; d++) query[d] = (float)qkv[row][head * DIM + d];
                attend_plainly(&heads, &cache, tiles[i].blocks, token, head / (HEADS / KV_HEADS), query, attended + head * DIM);
            }
            double *state = states + row * HIDDEN, *update = multiply_plainly(&layer.output, dense[1], attended);
            for (int k = 0; k < HIDDEN; k++) state[k] += update[k];
            double *normed = norm_plainly(state, layer.post_norm, HIDDEN);
            double *gates = multiply_plainly(&layer.gate_up, dense[2], normed);
            for (int k = 0; k < INNER; k++) gates[k] = gates[k] / (1 + exp(-gates[k])) * gates[INNER + k];
            double *down = multiply_plainly(&layer.down, dense[3], gates);
            for (int k = 0; k < HIDDEN; k++) expect("run_layers", hidden[row * HIDDEN + k], state[k] + down[k], 10, 2e-5);
            free(update), free(normed), free(gates), free(down);
        }
    for (int r = 0; r < rows; r++) free(qkv[r]);
    release_matrix(layer.qkv, dense[0]), release_matrix(layer.output, dense[1]);
    release_matrix(layer.gate_up, dense[2]), release_matrix(layer.down, dense[3]);
    free((void *)layer.input_norm), free((void *)layer.post_norm), free((void *)layer.query_norm), free((void *)layer.key_norm);
    free(layer.keys), free(layer.values), free(cosine), free(sine), free(hidden), free(states), free(attended), free(room);
}

int main(void) {
    check_products();
    check_updates();
    static const int dims[] = {16, 32, 48, 64, 80, 128, 256}, blocks[] = {1, 3, 4, 16, 64};
    for (int i = 0; i < 7; i++)
        for (int b = 0; b < 5; b++) {
            check_attention(dims[i], 4, 4, blocks[b], 0, 0);
            check_attention(dims[i], 9, 1, blocks[b], 5, 0);
            check_attention(dims[i], 6, 2, blocks[b], 70, 8.0f);
        }
    for (int width = 1; width < 70; width += 3)
        for (int rows = 0; rows < 19; rows += 6) check_norm(width, rows, 0), check_norm(width, rows, 1);
    for (int kind = 0; kind < 3; kind++)
        for (int has_norms = 0; has_norms < 2; has_norms++)
            check_layers(kind, has_norms, 0), check_layers(kind, has_norms, 9);
    printf("%s, %s: %s\n", vectors(), has_threads() ? "threads" : "one thread", failures ? "WRONG" : "right");
    return failures != 0;
}
