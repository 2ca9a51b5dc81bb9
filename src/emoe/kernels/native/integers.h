/* Products of int8 and int4 matrices with bfloat16 x in whole numbers, on processors that multiply and add int16 in pairs:
 * vpdpwssd. Included by products.h.
 *
 * x is taken in blocks of 128 columns, as int16 times a power of two that takes the block's largest number to 2^14 or
 * more: every number of at least 1/128 of the largest is kept exactly (bfloat16 has 8 bits), smaller ones to 2^-15 of it.
 * That is less, over a block, than what bfloat16 itself rounds. Sums of 8 columns are exact; blocks are added in float32.
 *
 * Prepared, a row of x is four vectors of int16 for each block, then the blocks' scales, then for each group of 32 columns
 * what int4's offset takes off: -8 times their sum. In int4, vector k has columns k, 4 + k, 8 + k, ...: nibble k of each
 * word of the matrix. */

#define SPAN 128 /* columns of a block */
#define QUAD (4 * SPAN) /* of four: int4 has 16 groups there */
#define NIBBLES_AHEAD (3 * AHEAD) /* int4 is computed nearly as slowly as it is read: at AHEAD 33 GB/s of 39, so 36 */
#define INTEGER_TILE 4 /* rows of x at once */

INLINE long spans(long in) { return (in + SPAN - 1) / SPAN; }
INLINE long quads(long in) { return (in + QUAD - 1) / QUAD; }

/* Bytes of a row of x: of its numbers, of those and the offsets, of all. */
INLINE long numbers_bytes(long in) { return spans(in) * SPAN * 2; }
INLINE long scales_at(long in) { return numbers_bytes(in) + quads(in) * LANES * 4; }
INLINE long integers_bytes(long in) { return align_up(scales_at(in) + spans(in) * 4, 64); }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

/* Whether x is prepared so. */
INLINE int in_integers(const shape *s) { return s->type == BF16 && (s->format == INT8 || s->format == INT4); }

INLINE __m512i words_of(const char *x, float by)
{
    const __m512 v = _mm512_mul_ps((__m512)load16(BF16, x), _mm512_set1_ps(by));
    const __m512 w = _mm512_mul_ps((__m512)load16(BF16, x + 32), _mm512_set1_ps(by));
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)), high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(w));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* One block of x [SPAN] into four vectors, and its groups' offsets; returns its scale, NaN if x is not finite. */
static float prepare_span(int split, const char *x, char *to, float *offset)
{
    const __m512i sign = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_setzero_si512(), v[4];
    for (int k = 0; k < 4; k++) most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(x + k * 64), sign));
    uint16_t lanes[32] __attribute__((aligned(64)));
    _mm512_store_si512(lanes, most);
    uint32_t largest = 0;
    for (int i = 0; i < 32; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    uint32_t exponent = largest >> 7;
    if (exponent == 255) {
        memset(to, 0, SPAN * 2);
        memset(offset, 0, 16);
        return NAN;
    }
    if (exponent < 15) exponent = 15; /* so that both powers are normal numbers; below 2^-112 x loses bits */
    const uint32_t bits[2] = {(268 - exponent) << 23, (exponent - 14) << 23};
    float powers[2];
    memcpy(powers, bits, sizeof powers);
    for (int k = 0; k < 4; k++) v[k] = words_of(x + k * 64, powers[0]);
    if (split) {
        __m512i plane[4], sum = _mm512_setzero_si512();
        const __m512i each = _mm512_set_epi16(124, 120, 116, 112, 108, 104, 100, 96, 92, 88, 84, 80, 76, 72, 68, 64, 60, 56,
                                              52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
        for (int k = 0; k < 4; k++) { /* the low half of what is chosen: columns of the first two vectors, or of the last two */
            const __m512i at = _mm512_add_epi16(each, _mm512_set1_epi16((short)k));
            const __m256i low = _mm512_castsi512_si256(_mm512_permutex2var_epi16(v[0], at, v[1]));
            const __m256i high = _mm512_castsi512_si256(_mm512_permutex2var_epi16(v[2], at, v[3]));
            plane[k] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            sum = _mm512_dpwssd_epi32(sum, plane[k], _mm512_set1_epi16(1));
        }
        int32_t lane[LANES] __attribute__((aligned(64))); /* each of 8 columns */
        _mm512_store_si512(lane, sum);
        for (int g = 0; g < 4; g++) {
            offset[g] = -8.0f * powers[1] * (float)(lane[4 * g] + lane[4 * g + 1] + lane[4 * g + 2] + lane[4 * g + 3]);
            v[g] = plane[g];
        }
    }
    for (int k = 0; k < 4; k++) _mm512_store_si512(to + k * 64, v[k]);
    return powers[1];
}

static void prepare_integers(const shape *s, const char *x, char *into)
{
    const long blocks = spans(s->in);
    float *offset = (float *)(into + numbers_bytes(s->in)), *scale = (float *)(into + scales_at(s->in));
    memset(offset, 0, (size_t)quads(s->in) * LANES * 4);
    for (long b = 0; b < blocks; b++) {
        const long left = s->in - b * SPAN;
        char rest[SPAN * 2] __attribute__((aligned(64)));
        const char *from = x + b * SPAN * 2;
        if (left < SPAN) {
            memset(rest, 0, sizeof rest);
            memcpy(rest, from, (size_t)left * 2);
            from = rest;
        }
        scale[b] = prepare_span(s->format == INT4, from, into + b * SPAN * 2, offset + b * 4);
    }
}

/* Four vectors of int16: the weights of one block, of which `left` columns are there. */
INLINE void words_of_weights(int format, int whole, const char *w, long left, __m512i *v)
{
    if (format == INT4) {
        const __m512i nibble = _mm512_set1_epi16(15);
        const __mmask64 there = left >= SPAN ? ~0ull : (1ull << left / 2) - 1;
        __m512i bytes = whole ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi8(there, w);
        __asm__("" : "+v"(bytes)); /* or GCC reads it four times: loads are what is short here */
        v[0] = _mm512_and_si512(bytes, nibble);
        v[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        v[2] = _mm512_and_si512(_mm512_srli_epi16(bytes, 8), nibble);
        v[3] = _mm512_srli_epi16(bytes, 12);
    } else {
        for (int k = 0; k < 4; k++) {
            const long n = left - k * STEP;
            const __mmask32 there = n >= STEP ? ~0u : n <= 0 ? 0 : (1u << n) - 1;
            v[k] = _mm512_cvtepi8_epi16(
                whole ? _mm256_loadu_si256((const __m256i *)(w + k * STEP)) : _mm256_maskz_loadu_epi8(there, w + k * STEP));
        }
    }
}

/* Add block `b`'s products with `tile` rows of x; `by`: int4's scales of its groups, a lane for 8 columns. */
INLINE void add_span(int format, int tile, const __m512i *v, __m512 by, const char *x, long stride, long in, long b, __m512 *sum)
{
    for (int t = 0; t < tile; t++) {
        const char *q = x + t * stride + b * SPAN * 2;
        __m512i whole = _mm512_setzero_si512();
        for (int k = 0; k < 4; k++) whole = _mm512_dpwssd_epi32(whole, v[k], _mm512_load_si512(q + k * 64));
        const __m512 each = _mm512_set1_ps(((const float *)(x + t * stride + scales_at(in)))[b]);
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), format == INT4 ? _mm512_mul_ps(each, by) : each, sum[t]);
    }
}

/* One row of the matrix with `tile` rows of x. */
INLINE void dot_integers(int format, int tile, const char *w, const char *scale, const char *x, long stride, long in, float *sums)
{
    const long bytes = format == INT4 ? SPAN / 2 : SPAN;
    const __m512i four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 sum[INTEGER_TILE], halves = _mm512_setzero_ps(), by = halves;
    __m512i v[4];
    for (int t = 0; t < tile; t++) sum[t] = _mm512_setzero_ps();
    for (long q = 0; q < quads(in); q++) {
        const long left = in - q * QUAD;
        if (format == INT4) {
            const __mmask16 groups = left >= QUAD ? 0xffff : (1u << left / STEP) - 1;
            halves = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(groups, scale + q * 32));
            __builtin_prefetch(scale + q * 32 + NIBBLES_AHEAD / 8);
            for (int t = 0; t < tile; t++)
                sum[t] = _mm512_fmadd_ps(halves, _mm512_load_ps(x + t * stride + numbers_bytes(in) + q * 64), sum[t]);
        }
        if (left >= QUAD) {
            for (int u = 0; u < 4; u++, w += bytes) {
                __builtin_prefetch(w + (format == INT4 ? NIBBLES_AHEAD : AHEAD));
                if (format == INT8) __builtin_prefetch(w + AHEAD + 64);
                words_of_weights(format, 1, w, SPAN, v);
                if (format == INT4) by = _mm512_permutexvar_ps(_mm512_add_epi32(four, _mm512_set1_epi32(u * 4)), halves);
                add_span(format, tile, v, by, x, stride, in, q * 4 + u, sum);
            }
        } else {
            for (int u = 0; u * SPAN < left; u++, w += bytes) {
                words_of_weights(format, 0, w, left - u * SPAN, v);
                if (format == INT4) by = _mm512_permutexvar_ps(_mm512_add_epi32(four, _mm512_set1_epi32(u * 4)), halves);
                add_span(format, tile, v, by, x, stride, in, q * 4 + u, sum);
            }
        }
    }
    for (int t = 0; t < tile; t++) sums[t] = sum16((vf)sum[t]);
}

INLINE void tile_of(int format, int tile, const shape *s, const job *j, long t, long from, long to)
{
    const matrix *m = j->weight;
    const long bytes = row_bytes(s), stride = prepared_bytes(s), groups = s->in / STEP;
    const char *x = j->x + t * stride;
    for (long r = from; r < to; r++) {
        const char *w = m->data + r * bytes, *scale = m->scale + r * groups * 2; /* int4's */
        const float bias = m->bias ? load1(BF16, m->bias + r * 2) : 0.0f;
        const float by = format == INT8 ? ((const float *)m->scale)[r] : 1.0f;
        float sums[INTEGER_TILE];
        dot_integers(format, tile, w, scale, x, stride, s->in, sums);
        for (int i = 0; i < tile; i++) store1(BF16, j->out + ((t + i) * s->out + r) * 2, sums[i] * by + bias);
    }
}

/* The unit's rows of the matrix once for each few rows of x, which stay in the first-level cache; it stays in the second. */
INLINE void integers_of(int format, const shape *s, const job *j, long from, long to)
{
    for (long t = 0; t < j->n; t += INTEGER_TILE) {
        switch (j->n - t) {
        case 1: tile_of(format, 1, s, j, t, from, to); break;
        case 2: tile_of(format, 2, s, j, t, from, to); break;
        case 3: tile_of(format, 3, s, j, t, from, to); break;
        default: tile_of(format, 4, s, j, t, from, to);
        }
    }
}

#else
INLINE int in_integers(const shape *s) { return (void)s, 0; }
static void prepare_integers(const shape *s, const char *x, char *into) { (void)s, (void)x, (void)into; }
INLINE void integers_of(int format, const shape *s, const job *j, long from, long to) { (void)format, (void)s, (void)j, (void)from, (void)to; }
#endif
