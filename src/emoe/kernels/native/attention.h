/* Attention of few query rows over keys and values as they lie in the cache: every key and every value is read once for all
 * queries of its head. Scores, softmax and sums in float32. One query's result depends on its own keys alone: keys that a
 * mask hides add zeros, so neither the number of rows in a call nor the number of threads changes a bit. */

enum { NO_MASK = 0, MASK_BOOL = 1, MASK_F32 = 2, MASK_BF16 = 3 };

typedef struct {
    int64_t batch, key_heads, group, rows, keys, size, value_size;
    int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row; /* in values */
    int64_t m_batch, m_head, m_row;
    int32_t type, mask_type;
    float scaling;
    int32_t causal; /* many rows without a mask: row i sees keys up to i */
} attention;

typedef struct {
    const attention *of;
    const char *q, *k, *v, *mask;
    const float *sinks; /* [heads], or none */
    char *out;          /* [batch, rows, heads, value_size] */
    _Atomic int failed;
    long parts; /* many rows: units of each key head */
} attending;

#define KEYS_AHEAD 32 /* keys that are fetched early */

/* Half of one vector's lanes added to the other half, for two vectors at once: lanes in blocks of `w`, a's and b's in turns. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

INLINE vf fold8(vf a, vf b)
{
    return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

INLINE vf fold4(vf a, vf b)
{
    return SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}

INLINE vf fold2(vf a, vf b)
{
    return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

INLINE vf fold1(vf a, vf b)
{
    return SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* Lane i: the sum of the lanes of v[i], all in the same order. */
INLINE vf sums16(vf *v)
{
    for (int i = 0; i < 8; i++) v[i] = fold8(v[i], v[i + 8]);
    for (int i = 0; i < 4; i++) v[i] = fold4(v[i], v[i + 4]);
    for (int i = 0; i < 2; i++) v[i] = fold2(v[i], v[i + 2]);
    return fold1(v[0], v[1]);
}

/* sum += 32 products of a key and a query that `prepare` has prepared. */
INLINE vf dot32(int type, vf sum, const char *key, const char *x)
{
#ifdef __AVX512BF16__
    if (type == BF16)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(key), (__m512bh)_mm512_load_si512(x));
#endif
    vf a, b;
    weights32(ROWS, type, key, &a, &b);
    sum += a * *(const vf_any *)x;
    return sum + b * *(const vf_any *)(x + 64);
}

/* scores[16] of up to 16 keys, `stride` bytes apart, with one query. */
INLINE vf score16(int type, const char *key, long stride, long many, const char *x, long size)
{
    const long bytes = type_bytes(type), step = type == F32 ? 128 :
#ifdef __AVX512BF16__
        64;
#else
        128;
#endif
    vf sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = (vf){0};
    long c = 0;
    if (many == LANES) {
        for (; c + STEP <= size; c += STEP, x += step)
            for (int i = 0; i < LANES; i++) sums[i] = dot32(type, sums[i], key + i * stride + c * bytes, x);
    } else {
        for (; c + STEP <= size; c += STEP, x += step)
            for (int i = 0; i < many; i++) sums[i] = dot32(type, sums[i], key + i * stride + c * bytes, x);
    }
    if (c < size)
        for (int i = 0; i < many; i++) {
            char rest[128] __attribute__((aligned(64))) = {0};
            memcpy(rest, key + i * stride + c * bytes, (size_t)((size - c) * bytes));
            sums[i] = dot32(type, sums[i], rest, x);
        }
    return sums16(sums);
}

/* s [padded to 16 keys]: scaled, masked scores -> weights that are not yet divided by their sum, which is returned. */
INLINE float soften(const attention *a, float *s, const char *mask, const float *sink)
{
    const vf least = splat(-3.4028235e38f);
    const long keys = a->keys, all = align_up(keys, LANES);
    vf most = least, sum = {0};
    for (long j = 0; j < all; j += LANES) {
        vf v = *(vf_any *)(s + j) * a->scaling;
        float add[LANES];
        const long n = keys - j < LANES ? keys - j : LANES;
        if (a->mask_type != NO_MASK) {
            for (long i = 0; i < LANES; i++) add[i] = 0;
            if (a->mask_type == MASK_BOOL && n == LANES) {
                *(vf_any *)add = (vf)((widen_unsigned(mask + j) == 0) & (vi)splat(-INFINITY));
            } else if (a->mask_type == MASK_BOOL) {
                for (long i = 0; i < n; i++) add[i] = mask[j + i] ? 0.0f : -INFINITY;
            } else {
                const int type = a->mask_type == MASK_F32 ? F32 : BF16;
                for (long i = 0; i < n; i++) add[i] = load1(type, mask + (j + i) * type_bytes(type));
            }
            v += *(vf_any *)add;
            const vi low = v < least; /* a row that sees no key gets a mean of values, never NaN */
            v = (vf)(((vi)v & ~low) | ((vi)least & low));
        }
        if (n < LANES) {
            for (long i = 0; i < LANES; i++) add[i] = i < n ? 0.0f : -INFINITY;
            v += *(vf_any *)add;
        }
        const vi more = v > most;
        most = (vf)(((vi)v & more) | ((vi)most & ~more));
        *(vf_any *)(s + j) = v;
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    if (sink && *sink > top) top = *sink;
    for (long j = 0; j < all; j += LANES) {
        const vf v = *(vf_any *)(s + j) - top;
        const vi gone = v < splat(-87.0f);
        const vf e = (vf)((vi)exp16(v) & ~gone);
        *(vf_any *)(s + j) = e;
        sum += e;
    }
    float total = sum16(sum);
    if (sink) {
        const vf v = splat(*sink - top), e = exp16(v);
        if (v[0] >= -87.0f) total += e[0];
    }
    return total;
}

/* out[tile][vectors * 16] = weights[tile][keys] V[keys], over `tile` queries and a slice of the values. */
INLINE void mix(int type, int tile, int vectors, const attention *a, const char *v, const float *weights, long stride,
                const float *by, char *const *out)
{
    const long bytes = type_bytes(type), row = a->v_row * bytes;
    vf sums[4][8];
    for (int t = 0; t < tile; t++)
        for (int c = 0; c < vectors; c++) sums[t][c] = (vf){0};
    for (long j = 0; j < a->keys; j++) {
        const char *p = v + j * row;
        for (long at = 0; at < vectors * LANES * bytes; at += 64) __builtin_prefetch(p + KEYS_AHEAD * row + at);
        for (int c = 0; c < vectors; c++) {
            const vf value = load16(type, p + c * LANES * bytes);
            for (int t = 0; t < tile; t++) sums[t][c] += value * weights[t * stride + j];
        }
    }
    for (int t = 0; t < tile; t++)
        for (int c = 0; c < vectors; c++)
            store16(type, out[t] + c * LANES * bytes, rounded(type, sums[t][c] * by[t]));
}

/* The same for the last `many` values, less than 16, of one query. */
INLINE void mix_rest(int type, const attention *a, const char *v, const float *weights, float by, char *out, long many)
{
    const long bytes = type_bytes(type);
    char rest[64] __attribute__((aligned(64))) = {0};
    vf sum = {0};
    for (long j = 0; j < a->keys; j++) {
        memcpy(rest, v + j * a->v_row * bytes, (size_t)(many * bytes));
        sum += load16(type, rest) * weights[j];
    }
    store16(type, rest, rounded(type, sum * by));
    memcpy(out, rest, (size_t)(many * bytes));
}

INLINE void attend(int type, attending *t, long unit)
{
    const attention *a = t->of;
    const long bytes = type_bytes(type), b = unit / a->key_heads, h = unit % a->key_heads, heads = a->key_heads * a->group;
    const shape query = {a->size, 1, ROWS, type};
    const long each = prepared_bytes(&query), n = a->group * a->rows, stride = align_up(a->keys, LANES);
    char *memory = scratch(n * each + n * stride * 4);
    if (!memory) {
        t->failed = 1;
        return;
    }
    float *scores = (float *)(memory + n * each);
    const char *k = t->k + (b * a->k_batch + h * a->k_head) * bytes, *v = t->v + (b * a->v_batch + h * a->v_head) * bytes;
    for (long i = 0; i < n; i++) {
        const long head = h * a->group + i / a->rows, r = i % a->rows;
        prepare(&query, t->q + (b * a->q_batch + head * a->q_head + r * a->q_row) * bytes, memory + i * each);
    }
    for (long j = 0; j < a->keys; j += LANES) {
        const char *key = k + j * a->k_row * bytes;
        const long many = a->keys - j < LANES ? a->keys - j : LANES;
        for (long i = 0; i < LANES; i++)
            for (long c = 0; c < a->size * bytes; c += 64) __builtin_prefetch(key + (KEYS_AHEAD + i) * a->k_row * bytes + c);
        for (long i = 0; i < n; i++)
            *(vf_any *)(scores + i * stride + j) = score16(type, key, a->k_row * bytes, many, memory + i * each, a->size);
    }
    const long mask_bytes = a->mask_type == MASK_F32 ? 4 : a->mask_type == MASK_BF16 ? 2 : 1;
    for (long i = 0; i < n; i += 4) {
        const int tile = n - i < 4 ? (int)(n - i) : 4;
        float by[4];
        char *out[4];
        for (int s = 0; s < tile; s++) {
            const long head = h * a->group + (i + s) / a->rows, r = (i + s) % a->rows;
            const char *mask = t->mask ? t->mask + (b * a->m_batch + head * a->m_head + r * a->m_row) * mask_bytes : 0;
            by[s] = 1.0f / soften(a, scores + (i + s) * stride, mask, t->sinks ? t->sinks + head : 0);
            out[s] = t->out + ((b * a->rows + r) * heads + head) * a->value_size * bytes;
        }
        const float *weights = scores + i * stride;
        long c = 0;
        while (c + LANES <= a->value_size) {
            char *to[4];
            const long wide = a->value_size - c >= 8 * LANES && tile < 3 ? 8 : a->value_size - c >= 4 * LANES ? 4 : 1;
            const char *from = v + c * bytes;
            for (int s = 0; s < tile; s++) to[s] = out[s] + c * bytes;
            if (wide == 8) {
                if (tile == 1) mix(type, 1, 8, a, from, weights, stride, by, to);
                else mix(type, 2, 8, a, from, weights, stride, by, to);
            } else if (wide == 4) {
                if (tile == 1) mix(type, 1, 4, a, from, weights, stride, by, to);
                else if (tile == 2) mix(type, 2, 4, a, from, weights, stride, by, to);
                else if (tile == 3) mix(type, 3, 4, a, from, weights, stride, by, to);
                else mix(type, 4, 4, a, from, weights, stride, by, to);
            } else {
                for (int s = 0; s < tile; s++) mix(type, 1, 1, a, from, weights + s * stride, stride, by + s, to + s);
            }
            c += wide * LANES;
        }
        for (int s = 0; c < a->value_size && s < tile; s++)
            mix_rest(type, a, v + c * bytes, weights + s * stride, by[s], out[s] + c * bytes, a->value_size - c);
    }
}

static void attend_unit(void *context, long unit)
{
    attending *t = context;
    if (t->of->type == BF16) attend(BF16, t, unit);
    else attend(F32, t, unit);
}
