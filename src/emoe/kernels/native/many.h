/* Products of many rows of bfloat16 x with a bfloat16 matrix, at the speed at which a processor multiplies pairs.
 *
 * [out, in] (ROWS): as both lie in memory, 8 rows of the matrix with 3 of x, the vectors along the columns; nothing is packed
 * and no number of rows is padded. The 8 rows stay in the first-level cache while x passes by.
 * [in, out] (COLUMNS): blocks of the matrix are packed as pairs of rows, 32 outputs with 12 rows of x, the vectors along the
 * outputs. Both fetch the next block while they compute.
 *
 * An output is summed in an order that depends on `in` alone: neither the number of rows nor of threads changes a bit. */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define MANY 1 /* with AMX oneDNN is faster */
#else
#define MANY 0
#endif

#define MANY_ROWS 128 /* rows of x at once: they stay in the second-level cache */

typedef struct {
    const shape *of;
    const matrix *weight;
    const char *x; /* [n, in] */
    char *out;     /* [n, out] */
    long n, unit;
    _Atomic int failed;
} multiplying;

#if MANY
#define TOGETHER 8   /* rows of the matrix, format ROWS */
#define BESIDE 3     /* rows of x with them */
#define KEPT 2048    /* columns of them: 32 KiB */
#define BOTH 1024    /* columns of which the next 8 rows have room in the first-level cache too */
#define PANEL 256    /* columns of a packed block, format COLUMNS */
#define DEEP 384     /* its rows at most */
#define TALL 12      /* rows of x with 32 columns */
#define UNROLL _Pragma("GCC unroll 16")

/* The sums of the lanes of 8 vectors. */
INLINE __m256 eight_sums(const __m512 v[TOGETHER])
{
    __m512 two[4], four[2];
    UNROLL for (int i = 0; i < 4; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    UNROLL for (int i = 0; i < 2; i++) {
        const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    all = _mm512_shuffle_f32x4(all, all, 0xd8);
    return _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
}

INLINE __m512bh pairs_at(const char *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* Rows of x times `rows` (8 or 1) of the matrix, `columns` of them: into or onto sums [tile][8]. Fetches two rows, to the
 * first-level cache (`near`) or to the second. */
INLINE void dots_of(int rows, int tile, int near, const char *w, long bytes, const char *x, long stride, long columns,
                    const char *const fetch[2], int onto, float *sums)
{
    __m512 s[BESIDE][TOGETHER];
    UNROLL for (int t = 0; t < tile; t++) UNROLL for (int r = 0; r < TOGETHER; r++) s[t][r] = _mm512_setzero_ps();
    long c = 0;
    for (; c + STEP <= columns; c += STEP) {
        __m512bh a[BESIDE];
        UNROLL for (int t = 0; t < tile; t++) a[t] = pairs_at(x + t * stride + c * 2);
        UNROLL for (int i = 0; i < 2; i++) {
            if (near) _mm_prefetch(fetch[i] + c * 2, _MM_HINT_T0);
            else _mm_prefetch(fetch[i] + c * 2, _MM_HINT_T1);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512bh b = pairs_at(w + r * bytes + c * 2);
            UNROLL for (int t = 0; t < tile; t++) s[t][r] = _mm512_dpbf16_ps(s[t][r], a[t], b);
        }
    }
    if (c < columns) {
        const __mmask32 some = (1u << (columns - c)) - 1;
        __m512bh a[BESIDE];
        UNROLL for (int t = 0; t < tile; t++) a[t] = (__m512bh)_mm512_maskz_loadu_epi16(some, x + t * stride + c * 2);
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512bh b = (__m512bh)_mm512_maskz_loadu_epi16(some, w + r * bytes + c * 2);
            UNROLL for (int t = 0; t < tile; t++) s[t][r] = _mm512_dpbf16_ps(s[t][r], a[t], b);
        }
    }
    UNROLL for (int t = 0; t < tile; t++) {
        __m256 sum = eight_sums(s[t]);
        if (onto) sum = _mm256_add_ps(sum, _mm256_loadu_ps(sums + t * TOGETHER));
        _mm256_storeu_ps(sums + t * TOGETHER, sum);
    }
}

#define MOST_PASSES 16 /* from so many on, a pass fetches a row at most and not all of them do */

/* Which rows of the next 8 a pass over x fetches: each once, evenly, as memory gives them, where there are passes enough,
 * else again and again: what was turned down or driven out comes back. One that has none names what is `there`. */
INLINE void to_fetch(long pass, long passes, int again, const char *next, long bytes, const char *there, const char *fetch[2])
{
    const long first = again ? pass % 4 * 2 : TOGETHER * pass / passes;
    const long count = again ? 2 : TOGETHER * (pass + 1) / passes - first;
    fetch[0] = count > 0 ? next + first * bytes : there;
    fetch[1] = count > 1 ? next + (first + 1) * bytes : there;
}

/* Outputs r .. r + rows of all rows of x: to `to` [n][STEP]. */
INLINE void rows_with(int rows, const multiplying *m, long r, const char *next, char *to)
{
    const shape *s = m->of;
    const long bytes = s->in * 2, passes = (m->n + BESIDE - 1) / BESIDE;
    float sums[MANY_ROWS + BESIDE][TOGETHER];
    const char *w = m->weight->data + r * bytes;
    for (long k = 0; k < s->in; k += KEPT) {
        const long columns = s->in - k < KEPT ? s->in - k : KEPT;
        const int room = s->in <= BOTH, near = room || passes >= MOST_PASSES;
        const int again = passes < (room ? MOST_PASSES : TOGETHER);
        for (long pass = 0; pass < passes; pass++) {
            const long t = pass * BESIDE;
            const char *x = m->x + t * bytes + k * 2, *at = w + k * 2, *fetch[2];
            to_fetch(pass, passes, again, next + k * 2, bytes, at, fetch);
            switch ((m->n - t < BESIDE ? m->n - t : BESIDE) + near * BESIDE) {
#define OF(tile, near) dots_of(rows, tile, near, at, bytes, x, bytes, columns, fetch, k > 0, sums[t]); break
            case 1: OF(1, 0);
            case 2: OF(2, 0);
            case 3: OF(3, 0);
            case 4: OF(1, 1);
            case 5: OF(2, 1);
            case 6: OF(3, 1);
#undef OF
            }
        }
    }
    const __mmask8 some = (__mmask8)((1u << rows) - 1);
    __m256 bias = _mm256_setzero_ps();
    if (m->weight->bias) {
        const __m128i half = _mm_maskz_loadu_epi16(some, m->weight->bias + r * 2);
        bias = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    for (long t = 0; t < m->n; t++) {
        const __m128bh out = _mm256_cvtneps_pbh(_mm256_add_ps(_mm256_loadu_ps(sums[t]), bias));
        _mm_mask_storeu_epi16(to + t * STEP * 2, some, (__m128i)out);
    }
}

/* At most STEP outputs of all rows of x. They are gathered and written as whole lines: rows of x whose outputs lie a power of
 * two apart share a few places of the first-level cache, and a quarter of a line at a time cost 2 to 8 %. */
static void many_by_rows(const multiplying *m, long from, long to)
{
    const long bytes = m->of->in * 2, every = m->of->out * 2;
    char done[MANY_ROWS][STEP * 2] __attribute__((aligned(64)));
    long r = from;
    for (; r + TOGETHER <= to; r += TOGETHER) {
        const long after = r + 2 * TOGETHER <= m->of->out ? r + TOGETHER : r; /* beyond the matrix nothing is fetched */
        rows_with(TOGETHER, m, r, m->weight->data + after * bytes, done[0] + (r - from) * 2);
    }
    for (; r < to; r++) rows_with(1, m, r, m->weight->data + (r - r % TOGETHER) * bytes, done[0] + (r - from) * 2);
    const __mmask32 some = to - from < STEP ? (1u << (to - from)) - 1 : ~0u;
    for (long t = 0; t < m->n; t++)
        _mm512_mask_storeu_epi16(m->out + t * every + from * 2, some, _mm512_load_si512(done[t]));
}

/* -- [in, out] ------------------------------------------------------------------------------------------------ */

/* Pairs of rows of a block [rows, columns], 32 columns one after another: to [columns / 32][pairs][32][2]; rows
 * beyond are zeros. */
static void pack_pairs(const char *w, long bytes, long rows, long columns, long pairs, char *to)
{
    for (long i = 0; i < pairs; i++) {
        const char *p = 2 * i < rows ? w + 2 * i * bytes : w;
        for (long c = 0; c < columns; c += STEP, p += 64) {
            const __mmask32 some = columns - c < STEP ? (1u << (columns - c)) - 1 : ~0u;
            const __m512i a = _mm512_maskz_loadu_epi16(2 * i < rows ? some : 0, p);
            const __m512i b = _mm512_maskz_loadu_epi16(2 * i + 1 < rows ? some : 0, p + (2 * i + 1 < rows ? bytes : 0));
            char *at = to + (c / STEP * pairs + i) * 128;
            _mm512_store_si512(at, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(at + 64, _mm512_unpackhi_epi16(a, b));
        }
    }
}

/* sums [tile][width] of 32 columns (+)= x [tile, 2 * pairs] times a packed block. Fetches a line of each of 2 * pairs rows. */
INLINE void panel_with(int tile, const char *packed, long pairs, const char *x, long stride, float *sums, long width,
                       int onto, const char *next, long next_bytes)
{
    __m512 s[TALL][2];
    const char *group[4] = {x, x + 3 * stride, x + 6 * stride, x + 9 * stride};
    UNROLL for (int t = 0; t < tile; t++) {
        s[t][0] = onto ? _mm512_loadu_ps(sums + t * width) : _mm512_setzero_ps();
        s[t][1] = onto ? _mm512_loadu_ps(sums + t * width + LANES) : _mm512_setzero_ps();
    }
    for (long i = 0; i < pairs; i++) {
        const __m512bh a = (__m512bh)_mm512_load_si512(packed + i * 128), b = (__m512bh)_mm512_load_si512(packed + i * 128 + 64);
        _mm_prefetch(next, _MM_HINT_T1);
        _mm_prefetch(next + next_bytes, _MM_HINT_T1);
        next += 2 * next_bytes;
        UNROLL for (int t = 0; t < tile; t++) {
            int32_t pair;
            memcpy(&pair, group[t / 3] + t % 3 * stride + i * 4, 4);
            const __m512bh by = (__m512bh)_mm512_set1_epi32(pair);
            s[t][0] = _mm512_dpbf16_ps(s[t][0], by, a);
            s[t][1] = _mm512_dpbf16_ps(s[t][1], by, b);
        }
    }
    UNROLL for (int t = 0; t < tile; t++) {
        _mm512_storeu_ps(sums + t * width, s[t][0]);
        _mm512_storeu_ps(sums + t * width + LANES, s[t][1]);
    }
}

static void panel_of(int tile, const char *packed, long pairs, const char *x, long stride, float *sums, long width,
                     int onto, const char *next, long next_bytes)
{
    switch (tile) {
#define OF(n) case n: panel_with(n, packed, pairs, x, stride, sums, width, onto, next, next_bytes); break;
    OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) OF(9) OF(10) OF(11) OF(12)
#undef OF
    }
}

/* Two rows' worth of sums in the order of pack_pairs to 32 outputs in their own. */
INLINE void store_panel(const float *sums, const char *bias, __mmask32 some, char *out)
{
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 a = _mm512_loadu_ps(sums), b = _mm512_loadu_ps(sums + LANES);
    __m512 first = _mm512_permutex2var_ps(a, low, b), second = _mm512_permutex2var_ps(a, high, b);
    if (bias) {
        const __m512i both = _mm512_maskz_loadu_epi16(some, bias);
        first = _mm512_add_ps(first, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        second = _mm512_add_ps(second, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    _mm512_mask_storeu_epi16(out, some, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

static void many_by_columns(multiplying *m, long from, long columns)
{
    static __thread char *memory; /* of the thread, kept */
    const shape *s = m->of;
    const long bytes = s->out * 2, stride = align_up(s->in, 2) * 2;
    const long blocks = (s->in + DEEP - 1) / DEEP, deep = align_up((s->in + blocks - 1) / blocks, 2);
    const long packed_bytes = DEEP * PANEL * 2;
    if (!memory) memory = aligned_alloc(64, (size_t)(packed_bytes + MANY_ROWS * PANEL * 4));
    if (!memory) {
        atomic_store(&m->failed, 1);
        return;
    }
    float *sums = (float *)(memory + packed_bytes);
    const char *w = m->weight->data + from * 2;
    const long tiles = (m->n + TALL - 1) / TALL;
    for (long k = 0; k < s->in; k += deep) {
        const long rows = s->in - k < deep ? s->in - k : deep, pairs = (rows + 1) / 2;
        pack_pairs(w + k * bytes, bytes, rows, columns, pairs, memory);
        const char *next = w + (k + deep) * bytes;
        if (k + deep >= s->in) next = from + 2 * PANEL <= s->out ? w + PANEL * 2 : 0;
        for (long c = 0; c < columns; c += STEP)
            for (long i = 0; i < tiles; i++) {
                const long t = m->n * i / tiles, tile = m->n * (i + 1) / tiles - t;
                const int fetches = i == 0 && next;
                panel_of((int)tile, memory + c / STEP * pairs * 128, pairs, m->x + t * stride + k * 2, stride,
                         sums + t * PANEL + c, PANEL, k > 0, fetches ? next + c * 2 : memory, fetches ? bytes : 0);
            }
    }
    for (long t = 0; t < m->n; t++)
        for (long c = 0; c < columns; c += STEP) {
            const __mmask32 some = columns - c < STEP ? (1u << (columns - c)) - 1 : ~0u;
            const char *bias = m->weight->bias ? m->weight->bias + (from + c) * 2 : 0;
            store_panel(sums + t * PANEL + c, bias, some, m->out + (t * s->out + from + c) * 2);
        }
}

static void many_unit(void *context, long number)
{
    multiplying *m = context;
    const long from = number * m->unit, to = from + m->unit < m->of->out ? from + m->unit : m->of->out;
    if (m->of->format == COLUMNS) many_by_columns(m, from, to - from);
    else many_by_rows(m, from, to);
}

/* out [n, out] = x [n, in] W + bias, n at most MANY_ROWS; for COLUMNS rows of x are `align_up(in, 2)` long. */
static int many_products(const shape *s, const matrix *weight, const char *x, char *out, long n, int threads)
{
    multiplying m = {s, weight, x, out, n, s->format == COLUMNS ? PANEL : STEP, 0};
    spread(threads, (s->out + m.unit - 1) / m.unit, many_unit, &m);
    return atomic_load(&m.failed) ? -1 : 0;
}
#else
static int many_products(const shape *s, const matrix *weight, const char *x, char *out, long n, int threads)
{
    (void)s, (void)weight, (void)x, (void)out, (void)n, (void)threads;
    return -1;
}
#endif
