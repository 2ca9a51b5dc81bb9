/* Products of bfloat16 (and of int4, unpacked to it) on processors that multiply and add bfloat16 in pairs, with sums in
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

/* -8 .. 7 in bfloat16, twice, so that the bit above a nibble does not matter */
#define NIBBLES 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0
static const uint16_t nibble_values[32] __attribute__((aligned(64))) = {NIBBLES, NIBBLES};

/* One row of int4 with `tile` rows of bfloat16 x: nibbles to bfloat16 by a table, 32 at a time. */
INLINE void dot_nibbles(int tile, const char *w, const float *scale, const char *x, long stride, long in, float *sums)
{
    __m512 sum[2][TILE]; /* of even and odd groups */
    const __m512i table = _mm512_load_si512(nibble_values);
    for (int t = 0; t < tile; t++) sum[0][t] = sum[1][t] = _mm512_setzero_ps();
    for (long c = 0; c < in; c += 2 * STEP) {
      if (c % 128 == 0) __builtin_prefetch(w + AHEAD);
      for (int u = 0; u < 2 && c + u * STEP < in; u++, w += LANES) {
        const __m512i bytes = (__m512i)widen_unsigned(w); /* low half: the even column; high half: the odd one */
        const __m512bh a = (__m512bh)_mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
        const __m512 by = _mm512_set1_ps(scale[c / STEP + u]);
        for (int t = 0; t < tile; t++) {
            const __m512bh b = (__m512bh)_mm512_load_si512(x + t * stride + (c + u * STEP) * 2);
            sum[u][t] = _mm512_fmadd_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), a, b), by, sum[u][t]);
        }
      }
    }
    for (int t = 0; t < tile; t++) sums[t] = sum16((vf)_mm512_add_ps(sum[0][t], sum[1][t]));
}

static void nibbles_in_pairs(const shape *s, const job *j, long from, long to)
{
    const long bytes = row_bytes(s), stride = prepared_bytes(s), groups = s->in / STEP;
    float scale[1024]; /* a row of up to 32768 columns; longer ones go the plain way */
    for (long r = from; r < to; r++) {
        const char *w = j->weight->data + r * bytes;
        const float bias = j->weight->bias ? load1(BF16, j->weight->bias + r * 2) : 0.0f;
        const char *halves = j->weight->scale + r * groups * 2;
        long g = 0;
        for (; g + LANES <= groups; g += LANES)
            _mm512_storeu_ps(scale + g, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(halves + g * 2))));
        for (; g < groups; g++) scale[g] = (float)((const _Float16 *)halves)[g];
        for (long t = 0; t < j->n; t += TILE) {
            const char *x = j->x + t * stride;
            const int tile = j->n - t < TILE ? (int)(j->n - t) : TILE;
            float sums[TILE];
            switch (tile) {
            case 1: dot_nibbles(1, w, scale, x, stride, s->in, sums); break;
            case 2: dot_nibbles(2, w, scale, x, stride, s->in, sums); break;
            case 3: dot_nibbles(3, w, scale, x, stride, s->in, sums); break;
            default: dot_nibbles(4, w, scale, x, stride, s->in, sums);
            }
            for (int i = 0; i < tile; i++) store1(BF16, j->out + ((t + i) * s->out + r) * 2, sums[i] + bias);
        }
    }
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
static void nibbles_in_pairs(const shape *s, const job *j, long from, long to) { rows_in_pairs(s, j, from, to); }
#endif
