/* Few tokens through experts and linear layers at the speed at which memory gives their weights. Called by ctypes
 * (calls.py); plain C, no libraries. Every pointer is to contiguous memory; sizes are in values. */

#define _GNU_SOURCE
#include "vectors.h"
#include "pool.h"
#include "products.h"
#include "many.h"
#include "gates.h"
#include "unpacking.h"
#include "threads.h"

#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    matrix first, down;
} expert;

typedef struct {
    shape first, down;
    int32_t gate; /* SILU or CLAMPED */
    float alpha, limit;
} layer;

/* Memory of the calling thread, kept from call to call. */
static char *scratch(long bytes)
{
    static __thread char *held;
    static __thread long size;
    if (bytes > size) {
        free(held);
        size = align_up(bytes, 1 << 16);
        held = aligned_alloc(64, (size_t)size);
        if (!held) size = 0;
    }
    return held;
}

INLINE long room(long bytes) { return align_up(bytes, 64); }

#include "attention.h"
#include "many_attention.h"
#include "norm.h"

typedef struct {
    const layer *of;
    const char *from;
    char *gated;
    char *ready;
} gating;

static void gate_unit(void *context, long row)
{
    const gating *g = context;
    const layer *l = g->of;
    const long size = type_bytes(l->first.type), width = l->down.in;
    char *to = g->gated + row * room(width * size);
    gate_row(l->first.type, l->gate, l->alpha, l->limit, width, g->from + row * l->first.out * size, to);
    prepare(&l->down, to, g->ready + row * prepared_bytes(&l->down));
}

/* Memory that `run_rest` wants, a multiple of 64. */
INLINE long rest_bytes(const layer *l, int experts, long rows)
{
    const long gated = rows * room(l->down.in * type_bytes(l->first.type)), ready = rows * prepared_bytes(&l->down);
    return room(gated + ready) + room(experts * (long)sizeof(job));
}

/* outer [rows, hidden] from the experts' first projections inner [rows, first.out], one expert's rows after another. */
static void run_rest(const layer *l, int experts, const expert *const *weights, const int32_t *counts, long rows,
                     const char *inner, char *memory, char *outer, int threads)
{
    const long size = type_bytes(l->first.type), width = l->down.in, ready_each = prepared_bytes(&l->down);
    job *jobs = (job *)memory;
    char *gated = memory + room(experts * (long)sizeof(job)), *ready = gated + rows * room(width * size);
    gating gate = {l, inner, gated, ready};
    spread(rows * width < 16384 ? 1 : threads, rows, gate_unit, &gate);
    for (long e = 0, row = 0; e < experts; row += counts[e++])
        jobs[e] = (job){&weights[e]->down, ready + row * ready_each, outer + row * l->down.out * size, counts[e]};
    products down = make_products(&l->down, jobs, experts, threads);
    spread(threads, down.units_each * experts, run_unit, &down);
}

/* Run experts, `counts[e]` rows of x each, one after another; `shared`: every expert runs the one row x instead.
 * outer [rows, hidden]. Returns -1 if there is no memory. */
static int run_experts(const layer *l, int experts, const expert *const *weights, const int32_t *counts, int shared,
                       const char *x, char *outer, int threads)
{
    const long size = type_bytes(l->first.type), in = prepared_bytes(&l->first);
    long rows = 0;
    for (int e = 0; e < experts; e++) rows += counts[e];
    const long inputs = shared ? 1 : rows, rows_x = inputs * in, rows_first = room(rows * l->first.out * size);
    char *memory = scratch(rows_x + rows_first + rest_bytes(l, experts, rows));
    if (!memory) return -1;
    char *inner = memory + rows_x, *rest = inner + rows_first;
    job *jobs = (job *)rest;
    for (long r = 0; r < inputs; r++) prepare(&l->first, x + r * l->first.in * size, memory + r * in);
    for (long e = 0, row = 0; e < experts; row += counts[e++])
        jobs[e] = (job){&weights[e]->first, memory + (shared ? 0 : row) * in, inner + row * l->first.out * size, counts[e]};
    products first = make_products(&l->first, jobs, experts, threads);
    spread(threads, first.units_each * experts, run_unit, &first);
    run_rest(l, experts, weights, counts, rows, inner, rest, outer, threads);
    return 0;
}

typedef struct {
    const layer *of;
    const char *from;
    char *to;
    long stride;
} many_gating;

static void many_gate_unit(void *context, long row)
{
    const many_gating *g = context;
    const layer *l = g->of;
    char *to = g->to + row * g->stride;
    gate_row(BF16, l->gate, l->alpha, l->limit, l->down.in, g->from + row * l->first.out * 2, to);
    memset(to + l->down.in * 2, 0, (size_t)(g->stride - l->down.in * 2));
}

/* Of n rows as many as one pass over a matrix takes: equal parts of at most MANY_ROWS. */
INLINE long even_part(long n)
{
    const long parts = (n + MANY_ROWS - 1) / MANY_ROWS;
    return (n + parts - 1) / parts;
}

/* Bytes of a row of x as `many_products` wants it. */
INLINE long many_stride(const shape *s) { return s->format == COLUMNS ? align_up(s->in, 2) * 2 : s->in * 2; }

/* Rows of x, those of `index` or (none) the n first: as they lie if that will do, else copied. */
static const char *many_rows(const shape *s, const char *x, const int64_t *index, long n, char *into)
{
    const long bytes = s->in * 2, stride = many_stride(s);
    if (stride == bytes && !index) return x;
    for (long r = 0; r < n; r++) {
        memcpy(into + r * stride, x + (index ? index[r] : r) * bytes, (size_t)bytes);
        memset(into + r * stride + bytes, 0, (size_t)(stride - bytes));
    }
    return into;
}

/* The bytes that all products of a list read. */
INLINE double bytes_of(const shape *s, int jobs)
{
    return (double)jobs * row_bytes(s) * (s->format == COLUMNS ? s->in : s->out);
}

/* out [hidden] = the weighted sum of k experts of one token x [hidden]; gates [k] of gates_type. */
EXPORT int emoe_one_token(const layer *l, int k, const expert *const *weights, const char *x, const char *gates,
                          int gates_type, char *out, int threads)
{
    static __thread char *outer;
    static __thread long held;
    int32_t counts[k];
    long bytes = k * l->down.out * type_bytes(l->down.type);
    if (bytes > held) {
        free(outer);
        outer = aligned_alloc(64, (size_t)room(bytes));
        held = outer ? bytes : 0;
        if (!outer) return -1;
    }
    for (int j = 0; j < k; j++) counts[j] = 1;
    timing t = begin_timing(bytes_of(&l->first, k) + bytes_of(&l->down, k), threads);
    int failed = run_experts(l, k, weights, counts, 1, x, outer, t.threads);
    combining all = {l->down.type, gates_type, k, l->down.out, outer, gates, 0, out};
    if (!failed) combine_unit(&all, 0);
    end_timing(&t);
    return failed;
}

/* outer [k, hidden]: what each of k experts of one token x [hidden] gives, as emoe_one_token computes it. */
EXPORT int emoe_rows(const layer *l, int k, const expert *const *weights, const char *x, char *outer, int threads)
{
    int32_t counts[k];
    for (int j = 0; j < k; j++) counts[j] = 1;
    timing t = begin_timing(bytes_of(&l->first, k) + bytes_of(&l->down, k), threads);
    int failed = run_experts(l, k, weights, counts, 1, x, outer, t.threads);
    end_timing(&t);
    return failed;
}

/* out [tokens, hidden] = the weighted sums of k such rows each, as emoe_one_token adds them; `place` [tokens * k] says where
 * in `outer` they are, none: one after another. */
EXPORT void emoe_combine(int type, long hidden, long tokens, int k, const char *outer, const int64_t *place,
                         const char *gates, int gates_type, char *out, int threads)
{
    combining all = {type, gates_type, k, hidden, outer, gates, place, out};
    spread(tokens * k * hidden < 65536 ? 1 : threads, tokens, combine_unit, &all);
}

/* outer [k, hidden]: the same from the experts' first projections inner [k, first.out], as emoe_products gives them. */
EXPORT int emoe_rest(const layer *l, int k, const expert *const *weights, const char *inner, char *outer, int threads)
{
    int32_t counts[k];
    for (int j = 0; j < k; j++) counts[j] = 1;
    char *memory = scratch(rest_bytes(l, k, k));
    if (!memory) return -1;
    timing t = begin_timing(bytes_of(&l->down, k), threads);
    run_rest(l, k, weights, counts, k, inner, memory, outer, t.threads);
    end_timing(&t);
    return 0;
}

/* outer [rows, hidden]: experts with counts[e] rows of x each, one expert's after another. */
EXPORT int emoe_experts(const layer *l, int experts, const expert *const *weights, const int32_t *counts, const char *x,
                        char *outer, int threads)
{
    timing t = begin_timing(bytes_of(&l->first, experts) + bytes_of(&l->down, experts), threads);
    int failed = run_experts(l, experts, weights, counts, 0, x, outer, t.threads);
    end_timing(&t);
    return failed;
}

/* out [n, out] = x [n, in] W + bias for each of `count` matrices of one shape; all x one after another, or shared. */
EXPORT int emoe_products(const shape *s, int count, const matrix *const *weights, int n, int shared, const char *x,
                         char *out, int threads)
{
    const long in = prepared_bytes(s), size = type_bytes(s->type), rows = (long)n * (shared ? 1 : count);
    char *memory = scratch(rows * in + count * (long)sizeof(job));
    if (!memory) return -1;
    job *jobs = (job *)(memory + rows * in);
    for (long r = 0; r < rows; r++) prepare(s, x + r * s->in * size, memory + r * in);
    for (long i = 0; i < count; i++)
        jobs[i] = (job){weights[i], memory + (shared ? 0 : i * n) * in, out + i * n * s->out * size, n};
    timing t = begin_timing(bytes_of(s, count), threads);
    products all = make_products(s, jobs, count, t.threads);
    spread(t.threads, all.units_each * count, run_unit, &all);
    end_timing(&t);
    return 0;
}

/* Whether emoe_many and emoe_many_products can be called: bfloat16 x and weights, formats ROWS and COLUMNS. */
EXPORT int emoe_knows_many(void) { return MANY; }

/* outer [n, hidden] = one expert's result for the rows `index` [n] of x [any, hidden]. */
EXPORT int emoe_many(const layer *l, const expert *weights, long n, const char *x, const int64_t *index, char *outer, int threads)
{
    const long most = n < MANY_ROWS ? n : MANY_ROWS, in = room(most * many_stride(&l->first));
    const long inner_bytes = room(most * l->first.out * 2), stride = many_stride(&l->down);
    char *memory = scratch(in + inner_bytes + room(most * stride));
    if (!memory) return -1;
    char *inner = memory + in, *gated = inner + inner_bytes;
    int failed = 0;
    for (long r = 0, rows; r < n && !failed; r += rows) {
        rows = even_part(n - r);
        const char *some = many_rows(&l->first, x, index + r, rows, memory);
        failed |= many_products(&l->first, &weights->first, some, inner, rows, threads);
        many_gating gate = {l, inner, gated, stride};
        spread(rows * l->down.in < 16384 ? 1 : threads, rows, many_gate_unit, &gate);
        failed |= many_products(&l->down, &weights->down, gated, outer + r * l->down.out * 2, rows, threads);
    }
    return failed;
}

/* out [n, out] = x [n, in] W + bias. */
EXPORT int emoe_many_products(const shape *s, const matrix *weight, long n, const char *x, char *out, int threads)
{
    char *memory = scratch(room((n < MANY_ROWS ? n : MANY_ROWS) * many_stride(s)));
    if (!memory) return -1;
    int failed = 0;
    for (long r = 0, rows; r < n && !failed; r += rows) {
        rows = even_part(n - r);
        const char *some = many_rows(s, x + r * s->in * 2, 0, rows, memory);
        failed |= many_products(s, weight, some, out + r * s->out * 2, rows, threads);
    }
    return failed;
}

/* to [rows, in] of the shape's type = integers * scales: rows of a quantised matrix as plain ones, for many rows of x. */
EXPORT void emoe_unpack(const shape *s, const matrix *from, long first, long rows, char *to, int threads)
{
    unpacking u = {s, from, to, first, rows};
    spread(threads, (rows + UNIT_ROWS - 1) / UNIT_ROWS, unpack_rows, &u);
}

/* out [batch, rows, heads, value_size] = attention of few rows; `mask` and `sinks` (one for each head) may be none. */
EXPORT int emoe_attention(const attention *a, const char *q, const char *k, const char *v, const char *mask,
                          const float *sinks, char *out, int threads)
{
    attending all = {a, q, k, v, mask, sinks, out, 0, 1};
    const double read = (double)a->batch * a->key_heads * a->keys * (a->size + a->value_size) * type_bytes(a->type);
    timing t = begin_timing(read, threads);
    spread(t.threads, a->batch * a->key_heads, attend_unit, &all);
    end_timing(&t);
    return all.failed ? -1 : 0;
}

/* The same for many rows of bfloat16, whose size is even, and values of at most 256. */
EXPORT int emoe_many_attention(const attention *a, const char *q, const char *k, const char *v, const char *mask,
                               const float *sinks, char *out, int threads)
{
    attending all = {a, q, k, v, mask, sinks, out, 0, many_parts(a, threads)};
    spread(threads, a->batch * a->key_heads * all.parts, attend_many_unit, &all);
    return all.failed ? -1 : 0;
}

typedef struct {
    int type, form;
    long size;
    float epsilon;
    const char *x, *weight;
    char *out;
} norming;

static void norm_unit(void *context, long row)
{
    const norming *n = context;
    const long at = row * n->size * type_bytes(n->type);
    if (n->type == BF16) norm_row(BF16, n->form, n->size, n->epsilon, n->x + at, n->weight, n->out + at);
    else norm_row(F32, n->form, n->size, n->epsilon, n->x + at, n->weight, n->out + at);
}

/* out [rows, size] = the norm of each row of x, times weight [size]. */
EXPORT void emoe_norm(int type, int form, long rows, long size, float epsilon, const char *x, const char *weight, char *out,
                      int threads)
{
    norming all = {type, form, size, epsilon, x, weight, out};
    spread(rows * size < 65536 ? 1 : threads, rows, norm_unit, &all);
}
