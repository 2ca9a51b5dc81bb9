/* Attention of many query rows in bfloat16: keys and values are packed once for each key head, or for each part of its rows,
 * then products of 12 queries with 32 keys, and of their weights with 32 values, are those of many.h. Keys that no row of the
 * 12 sees are left out. Scores, softmax and sums are float32, weights are rounded to bfloat16. A query's bits do not depend
 * on the other queries. */

#if MANY
/* Keys [n, size] as pairs of columns, 32 keys one after another: to [n / 32][size / 2][32][2]; missing keys are zeros. */
static void pack_keys(const char *k, long row, long n, long size, char *to)
{
    const long pairs = size / 2;
    for (long j = 0; j < align_up(n, STEP); j++) {
        int32_t *at = (int32_t *)(to + j / STEP * pairs * 128) + j % STEP;
        for (long c = 0; c < pairs; c++) {
            int32_t pair = 0;
            if (j < n) memcpy(&pair, k + j * row + c * 4, 4);
            at[c * STEP] = pair;
        }
    }
}

INLINE int hidden_at(const attention *a, const char *mask, long j)
{
    if (a->mask_type == MASK_BOOL) return !mask[j];
    const int type = a->mask_type == MASK_F32 ? F32 : BF16;
    return load1(type, mask + j * type_bytes(type)) < -3.38e38f;
}

/* The keys that a row of a mask shows: *first .. *last; all of them if it shows none. */
static void shown(const attention *a, const char *mask, long *first, long *last)
{
    const int whole = a->mask_type == MASK_BOOL;
    long i = 0, n = a->keys;
    while (whole && i + 64 <= n && !_mm512_test_epi8_mask(_mm512_loadu_si512(mask + i), _mm512_set1_epi8(-1))) i += 64;
    while (i < n && hidden_at(a, mask, i)) i++;
    if (i == n) {
        i = 0;
    } else {
        while (whole && n >= 64 && !_mm512_test_epi8_mask(_mm512_loadu_si512(mask + n - 64), _mm512_set1_epi8(-1))) n -= 64;
        while (hidden_at(a, mask, n - 1)) n--;
    }
    if (i < *first) *first = i;
    if (n > *last) *last = n;
}

/* `tile` queries of one head, the first of which is row r. */
static void attend_tile(const attending *t, long b, long head, long r, int tile, const char *keys, const char *values,
                        float *scores, char *weights, float *sums)
{
    const attention *a = t->of;
    const long pairs = a->size / 2, all = align_up(a->keys, STEP), value_pairs = all / 2;
    const long mask_bytes = a->mask_type == MASK_F32 ? 4 : a->mask_type == MASK_BF16 ? 2 : 1;
    const char *q = t->q + (b * a->q_batch + head * a->q_head + r * a->q_row) * 2;
    const char *mask = t->mask ? t->mask + (b * a->m_batch + head * a->m_head + r * a->m_row) * mask_bytes : 0;
    long first = a->keys, last = 0;
    if (mask)
        for (int i = 0; i < tile; i++) shown(a, mask + i * a->m_row * mask_bytes, &first, &last);
    else
        first = 0, last = a->causal ? r + tile : a->keys;
    first = first / STEP * STEP;
    const long end = align_up(last, STEP), wide = end - first;
    for (long j = first; j < end; j += STEP)
        panel_of(tile, keys + j / STEP * pairs * 128, pairs, q, a->q_row * 2, scores + j - first, all, 0, keys, 0);
    float by[TALL];
    for (int i = 0; i < tile; i++) {
        float *s = scores + i * all;
        attention part = *a;
        part.keys = (!mask && a->causal ? r + i + 1 : last) - first;
        const char *row = mask ? mask + (i * a->m_row + first) * mask_bytes : 0;
        by[i] = 1.0f / soften(&part, s, row, t->sinks ? t->sinks + head : 0);
        char *to = weights + i * all * 2;
        long j = 0;
        for (; j < align_up(part.keys, LANES); j += LANES)
            _mm256_store_si256((__m256i *)(to + j * 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(s + j)));
        memset(to + j * 2, 0, (size_t)((wide - j) * 2));
    }
    const long columns = align_up(a->value_size, STEP);
    for (long c = 0; c < columns; c += STEP)
        panel_of(tile, values + (c * value_pairs + first * STEP / 2) * 4, wide / 2, weights, all * 2, sums + c, PANEL, 0, values, 0);
    const long heads = a->key_heads * a->group;
    for (int i = 0; i < tile; i++) {
        float *sum = sums + i * PANEL;
        char *to = t->out + ((b * a->rows + r + i) * heads + head) * a->value_size * 2;
        for (long c = 0; c < columns; c += LANES) _mm512_storeu_ps(sum + c, _mm512_mul_ps(_mm512_loadu_ps(sum + c), _mm512_set1_ps(by[i])));
        for (long c = 0; c < a->value_size; c += STEP) {
            const __mmask32 some = a->value_size - c < STEP ? (1u << (a->value_size - c)) - 1 : ~0u;
            store_panel(sum + c, 0, some, to + c * 2);
        }
    }
}

#define UNITS_EACH 2  /* units of a thread, so that one that is held up delays the others by half its share */
#define PART_TILES 16 /* tiles of a unit at least: it packs the keys and values of its head for itself */

/* Units that the tiles of a key head make: several only where key heads alone are too few for the threads. */
static long many_parts(const attention *a, int threads)
{
    const long units = a->batch * a->key_heads, tiles = a->group * ((a->rows + TALL - 1) / TALL);
    long parts = threads < 2 ? 1 : (UNITS_EACH * threads + units - 1) / units;
    if (parts > tiles / PART_TILES) parts = tiles / PART_TILES;
    return parts < 1 ? 1 : parts;
}

static void attend_many_unit(void *context, long unit)
{
    attending *t = context;
    const attention *a = t->of;
    const long part = t->parts - 1 - unit / (a->batch * a->key_heads), pair = unit % (a->batch * a->key_heads);
    const long b = pair / a->key_heads, h = pair % a->key_heads, all = align_up(a->keys, STEP);
    const long key_bytes = all * a->size * 2, value_bytes = all * align_up(a->value_size, STEP) * 2;
    char *memory = scratch(key_bytes + value_bytes + TALL * all * (4 + 2) + TALL * PANEL * 4);
    if (!memory) {
        t->failed = 1;
        return;
    }
    char *values = memory + key_bytes, *weights = values + value_bytes;
    float *scores = (float *)(weights + TALL * all * 2), *sums = scores + TALL * all;
    pack_keys(t->k + (b * a->k_batch + h * a->k_head) * 2, a->k_row * 2, a->keys, a->size, memory);
    pack_pairs(t->v + (b * a->v_batch + h * a->v_head) * 2, a->v_row * 2, a->keys, a->value_size, all / 2, values);
    /* Tiles in the order of their rows: the last parts of a causal prompt see the most keys, and are begun first. */
    const long tiles = (a->rows + TALL - 1) / TALL * a->group;
    for (long i = tiles * part / t->parts; i < tiles * (part + 1) / t->parts; i++) {
        const long head = h * a->group + i % a->group, r = i / a->group * TALL;
        attend_tile(t, b, head, r, a->rows - r < TALL ? (int)(a->rows - r) : TALL, memory, values, scores, weights, sums);
    }
}
#else
static long many_parts(const attention *a, int threads)
{
    (void)a, (void)threads;
    return 1;
}

static void attend_many_unit(void *context, long unit)
{
    (void)unit;
    ((attending *)context)->failed = 1;
}
#endif
