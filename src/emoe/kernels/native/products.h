/* Products of a few rows x [n, in] with a matrix, y = W x + bias, that read the matrix once.
 *
 * Formats ROWS, INT8, INT4: each output is one row's dot product, in two sums of 16 lanes; a thread walks through its rows as
 * through one array, fetching AHEAD bytes early: that is what reads memory fastest (bench/expert_kernels.py).
 * Format COLUMNS: outputs lie side by side, so sums are kept in the first-level cache: all of a row's for one row of x, which
 * then walks through one array too, else 512 at a time, 8 rows of the matrix added at once. Every output of every row of x is summed in an order of its own that depends on the shape alone:
 * neither the number of threads nor the number of rows changes a bit. */

#define AHEAD 4096
#define BLOCK 512    /* columns of a unit of work, format COLUMNS */
#define WIDE 6144    /* of one for a single row of x where threads are few: then one row of the matrix after another */
#define UNIT_BYTES (128 << 10)
#define TILE 4       /* rows of x at once */

typedef struct {
    const char *data, *scale, *bias;
} matrix;

typedef struct {
    int64_t in, out;
    int32_t format, type;
} shape;

typedef struct {
    const matrix *weight;
    const char *x; /* from `prepare`, n rows of `prepared_bytes` */
    char *out;      /* n rows of `out` values */
    long n;
} job;

INLINE long padded(long in) { return align_up(in, STEP); }

/* Whether weights and x stay bfloat16: processors that multiply and add them in pairs do twice the work at a time. */
INLINE int in_pairs(const shape *s)
{
#ifdef __AVX512BF16__
    return s->type == BF16 && s->format == ROWS;
#else
    (void)s;
    return 0;
#endif
}

INLINE long prepared_bytes(const shape *s);

INLINE long row_bytes(const shape *s)
{
    long columns = s->format == COLUMNS ? s->out : s->in;
    return s->format == INT4 ? columns / 2 : s->format == INT8 ? columns : columns * type_bytes(s->type);
}

#include "integers.h"

/* Bytes of a row of x as `prepare` leaves it. */
INLINE long prepared_bytes(const shape *s)
{
    if (in_integers(s)) return integers_bytes(s->in);
    return align_up(padded(s->in) * (in_pairs(s) ? 2 : 4), 64);
}

/* Whether weights are read as even columns and odd columns. */
INLINE int splits(const shape *s) { return s->format == INT4 || (s->format == ROWS && s->type == BF16); }

/* Write a row of x padded with zeros, as floats in the order in which the product reads them, or as it is. */
static void prepare(const shape *s, const char *x, char *into)
{
    long bytes = type_bytes(s->type), split = splits(s);
    float *to = (float *)into;
    if (in_integers(s)) {
        prepare_integers(s, x, into);
        return;
    }
    if (in_pairs(s)) {
        memcpy(into, x, (size_t)(s->in * 2));
        memset(into + s->in * 2, 0, (size_t)((padded(s->in) - s->in) * 2));
        return;
    }
    for (long c = 0; c < padded(s->in); c += STEP) {
        float block[STEP];
        if (c + STEP <= s->in) {
            *(vf_any *)block = load16(s->type, x + c * bytes);
            *(vf_any *)(block + LANES) = load16(s->type, x + (c + LANES) * bytes);
        } else {
            for (long i = 0; i < STEP; i++) block[i] = c + i < s->in ? load1(s->type, x + (c + i) * bytes) : 0.0f;
        }
        for (long i = 0; i < STEP; i++) to[c + i] = block[split ? (i % LANES) * 2 + i / LANES : i];
    }
}

/* 32 weights as two vectors. */
INLINE void weights32(int format, int type, const char *w, vf *a, vf *b)
{
    if (format == INT8) {
        *a = __builtin_convertvector(widen_signed(w), vf);
        *b = __builtin_convertvector(widen_signed(w + LANES), vf);
    } else if (format == INT4) {
        vi both = widen_unsigned(w);
#ifdef __AVX512F__
        const vf table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        *a = __builtin_shuffle(table, both);
        *b = __builtin_shuffle(table, both >> 4);
#else
        *a = __builtin_convertvector((both & 15) - 8, vf);
        *b = __builtin_convertvector((both >> 4) - 8, vf);
#endif
    } else if (type == BF16) {
        vu both = *(const vu_any *)w;
        *a = (vf)(both << 16);
        *b = (vf)(both & 0xffff0000u);
    } else {
        *a = *(const vf_any *)w;
        *b = *(const vf_any *)(w + 64);
    }
}

INLINE void add_products(int format, int tile, vf a, vf b, const char *scale, const float *x, long stride, vf *first, vf *second)
{
    if (format == INT4) {
        const vf by = splat((float)*(const _Float16 *)scale);
        for (int t = 0; t < tile; t++)
            first[t] += (a * *(const vf_any *)(x + t * stride) + b * *(const vf_any *)(x + t * stride + LANES)) * by;
    } else {
        for (int t = 0; t < tile; t++) first[t] += a * *(const vf_any *)(x + t * stride);
        for (int t = 0; t < tile; t++) second[t] += b * *(const vf_any *)(x + t * stride + LANES);
    }
}

/* One row of the matrix with `tile` rows of x. */
INLINE void dot(int format, int type, int tile, const char *w, const char *scale, const float *x, long stride, long in,
                float *sums)
{
    const long bytes = format == INT4 ? 16 : format == INT8 ? 32 : type == BF16 ? 64 : 128;
    /* A sum takes 4 cycles to add to: with fewer bytes a step, more sums, or adding is what takes the time. */
    const int sets = bytes < 64 ? 2 : 1;
    vf first[2][TILE], second[2][TILE];
    for (int t = 0; t < tile; t++) first[0][t] = first[1][t] = second[0][t] = second[1][t] = (vf){0};
    long c = 0;
    for (; c + sets * STEP <= in; c += sets * STEP) {
        if (bytes >= 32 || c % (4 * STEP) == 0) __builtin_prefetch(w + AHEAD);
        if (bytes == 128) __builtin_prefetch(w + AHEAD + 64);
        for (int u = 0; u < sets; u++, w += bytes) {
            vf a, b;
            weights32(format, type, w, &a, &b);
            add_products(format, tile, a, b, format == INT4 ? scale + (c / STEP + u) * 2 : 0, x + c + u * STEP, stride, first[u], second[u]);
        }
    }
    if (sets == 2 && c + STEP <= in) {
        vf a, b;
        weights32(format, type, w, &a, &b);
        add_products(format, tile, a, b, format == INT4 ? scale + c / STEP * 2 : 0, x + c, stride, first[0], second[0]);
        c += STEP, w += bytes;
    }
    if (c < in) { /* never INT4: its columns come in groups of 32 */
        char rest[128] __attribute__((aligned(64))) = {0};
        vf a, b;
        memcpy(rest, w, (size_t)((in - c) * bytes / STEP));
        weights32(format, type, rest, &a, &b);
        add_products(format, tile, a, b, 0, x + c, stride, first[0], second[0]);
    }
    for (int t = 0; t < tile; t++) sums[t] = sum16((first[0][t] + second[0][t]) + (first[1][t] + second[1][t]));
}

#include "pairs.h"

INLINE void rows_of(int format, int type, const shape *s, const job *j, long from, long to)
{
    const matrix *m = j->weight;
    const long bytes = row_bytes(s), stride = prepared_bytes(s) / 4, groups = s->in / STEP;
    for (long r = from; r < to; r++) {
        const char *w = m->data + r * bytes, *scale = format == INT4 ? m->scale + r * groups * 2 : 0;
        const float bias = m->bias ? load1(type, m->bias + r * type_bytes(type)) : 0.0f;
        const float by = format == INT8 ? ((const float *)m->scale)[r] : 1.0f;
        for (long t = 0; t < j->n; t += TILE) {
            const float *x = (const float *)j->x + t * stride;
            float sums[TILE];
            int tile = j->n - t < TILE ? (int)(j->n - t) : TILE;
            switch (tile) {
            case 1: dot(format, type, 1, w, scale, x, stride, s->in, sums); break;
            case 2: dot(format, type, 2, w, scale, x, stride, s->in, sums); break;
            case 3: dot(format, type, 3, w, scale, x, stride, s->in, sums); break;
            default: dot(format, type, 4, w, scale, x, stride, s->in, sums);
            }
            for (int i = 0; i < tile; i++)
                store1(type, j->out + ((t + i) * s->out + r) * type_bytes(type), sums[i] * by + bias);
        }
    }
}

/* y[tile][columns] += x[tile][rows i..i+many] W[i..i+many][columns] */
INLINE void add_rows(int type, int tile, int many, const char *w, long bytes, const float *x, long stride, long columns, float *y)
{
    for (long c = 0; c < columns; c += STEP) {
        vf a[TILE], b[TILE];
        for (int t = 0; t < tile; t++) {
            a[t] = *(const vf_any *)(y + t * BLOCK + c);
            b[t] = *(const vf_any *)(y + t * BLOCK + c + LANES);
        }
        for (int i = 0; i < many; i++) {
            const char *p = w + i * bytes + c * type_bytes(type);
            char rest[128] __attribute__((aligned(64)));
            vf u, v;
            __builtin_prefetch(p + many * bytes);
            if (type == F32) __builtin_prefetch(p + many * bytes + 64);
            if (c + STEP > columns) {
                memset(rest, 0, sizeof rest);
                memcpy(rest, p, (size_t)((columns - c) * type_bytes(type)));
                p = rest;
            }
            weights32(COLUMNS, type, p, &u, &v);
            for (int t = 0; t < tile; t++) {
                vf by = splat(x[t * stride + i]);
                a[t] += u * by;
                b[t] += v * by;
            }
        }
        for (int t = 0; t < tile; t++) {
            *(vf_any *)(y + t * BLOCK + c) = a[t];
            *(vf_any *)(y + t * BLOCK + c + LANES) = b[t];
        }
    }
}

INLINE void columns_with(int type, int tile, const shape *s, const job *j, long t0, long from, long columns)
{
    const long bytes = row_bytes(s), stride = prepared_bytes(s) / 4, size = type_bytes(type);
    const char *w = j->weight->data + from * size, *bias = j->weight->bias;
    const float *x = (const float *)j->x + t0 * stride;
    float y[WIDE > TILE * BLOCK ? WIDE : TILE * BLOCK] __attribute__((aligned(64)));
    long i = 0;
    memset(y, 0, (size_t)(columns > BLOCK ? align_up(columns, STEP) : tile * BLOCK) * sizeof *y);
    for (; tile == 1 && columns > BLOCK && i < s->in; i++) add_rows(type, 1, 1, w + i * bytes, bytes, x + i, stride, columns, y);
    for (; i + 8 <= s->in; i += 8) add_rows(type, tile, 8, w + i * bytes, bytes, x + i, stride, columns, y);
    for (; i < s->in; i++) add_rows(type, tile, 1, w + i * bytes, bytes, x + i, stride, columns, y);
    for (int t = 0; t < tile; t++)
        for (long c = 0; c < columns; c++) {
            long at = type == BF16 ? c / STEP * STEP + c % 2 * LANES + c % STEP / 2 : c;
            float add = bias ? load1(type, bias + (from + c) * size) : 0.0f;
            store1(type, j->out + ((t0 + t) * s->out + from + c) * size, y[t * BLOCK + at] + add);
        }
}

INLINE void columns_of(int type, const shape *s, const job *j, long from, long columns)
{
    for (long t = 0; t < j->n; t += TILE) {
        switch (j->n - t) {
        case 1: columns_with(type, 1, s, j, t, from, columns); break;
        case 2: columns_with(type, 2, s, j, t, from, columns); break;
        case 3: columns_with(type, 3, s, j, t, from, columns); break;
        default: columns_with(type, 4, s, j, t, from, columns);
        }
    }
}

/* -- a list of products of one shape, cut into units of work ------------------------------------------------ */

typedef struct {
    const shape *of;
    const job *jobs;
    long units_each, unit;
} products;

/* For up to `threads` threads, on whose number no bit depends. */
INLINE products make_products(const shape *s, const job *jobs, long count, int threads)
{
    long unit = BLOCK;
    if (s->format == COLUMNS && s->out <= WIDE && (count % threads == 0 || count > 4L * threads)) {
        int single = 1;
        for (long i = 0; i < count; i++) single &= jobs[i].n == 1;
        if (single) unit = s->out;
    }
    if (s->format != COLUMNS) {
        unit = UNIT_BYTES / row_bytes(s);
        unit = unit < 8 ? 8 : unit;
    }
    return (products){s, jobs, (s->out + unit - 1) / unit, unit};
}

static void run_unit(void *context, long number)
{
    const products *p = context;
    const shape *s = p->of;
    const job *j = p->jobs + number / p->units_each;
    long from = number % p->units_each * p->unit, to = from + p->unit < s->out ? from + p->unit : s->out;
    if (s->format == COLUMNS) {
        if (s->type == BF16) columns_of(BF16, s, j, from, to - from);
        else columns_of(F32, s, j, from, to - from);
    } else if (in_integers(s)) {
        if (s->format == INT8) integers_of(INT8, s, j, from, to);
        else integers_of(INT4, s, j, from, to);
    } else if (s->format == INT8) {
        if (s->type == BF16) rows_of(INT8, BF16, s, j, from, to);
        else rows_of(INT8, F32, s, j, from, to);
    } else if (s->format == INT4) {
        if (s->type == BF16) rows_of(INT4, BF16, s, j, from, to);
        else rows_of(INT4, F32, s, j, from, to);
    } else if (in_pairs(s)) {
        rows_in_pairs(s, j, from, to);
    } else {
        if (s->type == BF16) rows_of(ROWS, BF16, s, j, from, to);
        else rows_of(ROWS, F32, s, j, from, to);
    }
}
