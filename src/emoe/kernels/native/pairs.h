/* Products of bfloat16 on processors that multiply and add bfloat16 in pairs, with sums in
 * float32: vdpbf16ps. Included by products.h. */

#ifdef __AVX512BF16__
/* One or two rows of the matrix with `tile` rows of x, both bfloat16: sums [rows][TILE]. */
INLINE void dot_pairs(int rows, int tile, const char *w, long bytes, const char *x, long stride, long in, float sums[][TILE])
{
    __m512 first[2][TILE], second[2][TILE];
    long c = 0;
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) first[r][t] = second[r][t] = _mm512_setzero_ps();
    for (; c + 2 * STEP <= in; c += 2 * STEP)
        for (int r = 0; r < rows; r++) {
            const char *p = w + r * bytes + c * 2;
            __builtin_prefetch(p + AHEAD);
            __builtin_prefetch(p + AHEAD + 64);
            const __m512bh a = (__m512bh)_mm512_loadu_si512(p), b = (__m512bh)_mm512_loadu_si512(p + 64);
            for (int t = 0; t < tile; t++) {
                const char *q = x + t * stride + c * 2;
                first[r][t] = _mm512_dpbf16_ps(first[r][t], a, (__m512bh)_mm512_load_si512(q));
                second[r][t] = _mm512_dpbf16_ps(second[r][t], b, (__m512bh)_mm512_load_si512(q + 64));
            }
        }
    for (; c < in; c += STEP)
        for (int r = 0; r < rows; r++) {
            char rest[64] __attribute__((aligned(64))) = {0};
            memcpy(rest, w + r * bytes + c * 2, (size_t)((in - c < STEP ? in - c : STEP) * 2));
            const __m512bh a = (__m512bh)_mm512_load_si512(rest);
            for (int t = 0; t < tile; t++) {
                const __m512bh b = (__m512bh)_mm512_load_si512(x + t * stride + c * 2);
                first[r][t] = _mm512_dpbf16_ps(first[r][t], a, b);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) sums[r][t] = sum16((vf)_mm512_add_ps(first[r][t], second[r][t]));
}

INLINE void store_pairs(int rows, int tile, const shape *s, const job *j, long t, long r)
{
    const long bytes = row_bytes(s), stride = prepared_bytes(s);
    float sums[2][TILE];
    dot_pairs(rows, tile, j->weight->data + r * bytes, bytes, j->x + t * stride, stride, s->in, sums);
    for (int q = 0; q < rows; q++) {
        const float bias = j->weight->bias ? load1(BF16, j->weight->bias + (r + q) * 2) : 0.0f;
        for (int i = 0; i < tile; i++) store1(BF16, j->out + ((t + i) * s->out + r + q) * 2, sums[q][i] + bias);
    }
}

/* One row of the matrix at a time reads memory fastest; with many of x, two share what is read of x. */
static void rows_in_pairs(const shape *s, const job *j, long from, long to)
{
    long r = from;
    if (j->n <= TILE) {
        switch (j->n) {
        case 1: for (; r < to; r++) store_pairs(1, 1, s, j, 0, r); return;
        case 2: for (; r < to; r++) store_pairs(1, 2, s, j, 0, r); return;
        case 3: for (; r < to; r++) store_pairs(1, 3, s, j, 0, r); return;
        default: for (; r < to; r++) store_pairs(1, 4, s, j, 0, r); return;
        }
    }
    for (; r < to; r += 2)
        for (long t = 0; t < j->n; t += TILE) {
            const int left = (int)(j->n - t);
            if (r + 1 < to) {
                if (left == 1) store_pairs(2, 1, s, j, t, r);
                else if (left == 2) store_pairs(2, 2, s, j, t, r);
                else if (left == 3) store_pairs(2, 3, s, j, t, r);
                else store_pairs(2, 4, s, j, t, r);
            } else {
                for (int i = 0; i < left && i < TILE; i++) store_pairs(1, 1, s, j, t + i, r);
            }
        }
}
#else
static void rows_in_pairs(const shape *s, const job *j, long from, long to) { (void)s, (void)j, (void)from, (void)to; }
#endif
