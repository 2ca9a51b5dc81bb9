/* Quantised matrices as plain ones, for many rows of x: integers times scales in float32, rounded once. */

#define UNIT_ROWS 16 /* of a unit of work */

typedef struct {
    const shape *of;
    const matrix *from;
    char *to; /* of row `first` */
    long first, rows;
} unpacking;

/* 32 values: of int4, `a` has the even columns and `b` the odd ones. */
INLINE void store32(int format, int type, char *to, vf a, vf b)
{
    if (format == INT8) {
        store16(type, to, a);
        store16(type, to + LANES * type_bytes(type), b);
    } else if (type == BF16) {
        *(vu_any *)to = (vu)a >> 16 | ((vu)b & 0xffff0000u);
    } else {
        float even[LANES], odd[LANES];
        *(vf_any *)even = a, *(vf_any *)odd = b;
        for (int i = 0; i < LANES; i++) store1(F32, to + i * 8, even[i]), store1(F32, to + i * 8 + 4, odd[i]);
    }
}

INLINE void unpack_row(int format, int type, const shape *s, const matrix *m, long r, char *to)
{
    const long size = type_bytes(type), step = format == INT4 ? STEP / 2 : STEP;
    const char *w = m->data + r * row_bytes(s);
    float by = format == INT4 ? 0.0f : ((const float *)m->scale)[r];
    long c = 0;
    for (; c + STEP <= s->in; c += STEP, w += step) {
        vf a, b;
        __builtin_prefetch(w + AHEAD);
        weights32(format, type, w, &a, &b);
        if (format == INT4) by = (float)((const _Float16 *)m->scale)[r * (s->in / STEP) + c / STEP];
        store32(format, type, to + c * size, rounded(type, a * by), rounded(type, b * by));
    }
    for (; c < s->in; c++) store1(type, to + c * size, (float)*(const int8_t *)w++ * by); /* int4 has groups of 32 */
}

static void unpack_rows(void *context, long unit)
{
    const unpacking *u = context;
    const shape *s = u->of;
    const long from = unit * UNIT_ROWS, to = from + UNIT_ROWS < u->rows ? from + UNIT_ROWS : u->rows;
    for (long i = from; i < to; i++) {
        const long r = u->first + i;
        char *row = u->to + i * s->in * type_bytes(s->type);
        if (s->format == INT4) {
            if (s->type == BF16) unpack_row(INT4, BF16, s, u->from, r, row);
            else unpack_row(INT4, F32, s, u->from, r, row);
        } else {
            if (s->type == BF16) unpack_row(INT8, BF16, s, u->from, r, row);
            else unpack_row(INT8, F32, s, u->from, r, row);
        }
    }
}
