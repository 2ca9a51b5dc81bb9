/* What stands between an expert's two projections, rounded to the activations' type where transformers rounds, and the
 * weighted sum after them. */

enum {
    SILU = 1,   /* [gate | up]: silu(gate) * up */
    CLAMPED = 2 /* gate and up in turns (gpt-oss): min(gate, limit) * sigmoid(alpha * gate) * (clamp(up) + 1) */
};

INLINE vf gated16(int type, int kind, float alpha, float limit, vf gate, vf up)
{
    if (kind == SILU) return rounded(type, rounded(type, gate / (exp16(-gate) + 1.0f)) * up);
    vi above = gate > splat(limit), over = up > splat(limit), under = up < splat(-limit);
    gate = (vf)(((vi)gate & ~above) | ((vi)splat(limit) & above));
    up = (vf)(((vi)up & ~over & ~under) | ((vi)splat(limit) & over) | ((vi)splat(-limit) & under));
    vf scaled = rounded(type, gate * alpha);
    vf glu = rounded(type, gate * rounded(type, 1.0f / (exp16(-scaled) + 1.0f)));
    return rounded(type, rounded(type, up + 1.0f) * glu);
}

/* from [2 * width] -> to [width] */
static void gate_row(int type, int kind, float alpha, float limit, long width, const char *from, char *to)
{
    const long size = type_bytes(type);
    for (long c = 0; c < width; c += LANES) {
        float gates[LANES] = {0}, ups[LANES] = {0}, out[LANES];
        long n = width - c < LANES ? width - c : LANES;
        if (kind == SILU && n == LANES) {
            *(vf_any *)gates = load16(type, from + c * size);
            *(vf_any *)ups = load16(type, from + (width + c) * size);
        } else if (kind == CLAMPED && type == BF16 && n == LANES) {
            const vu both = *(const vu_any *)(from + 2 * c * size);
            *(vf_any *)gates = (vf)(both << 16);
            *(vf_any *)ups = (vf)(both & 0xffff0000u);
        } else {
            for (long i = 0; i < n; i++) {
                gates[i] = load1(type, from + (kind == SILU ? c + i : 2 * (c + i)) * size);
                ups[i] = load1(type, from + (kind == SILU ? width + c + i : 2 * (c + i) + 1) * size);
            }
        }
        vf v = gated16(type, kind, alpha, limit, *(vf_any *)gates, *(vf_any *)ups);
        if (n == LANES) {
            store16(type, to + c * size, v);
        } else {
            *(vf_any *)out = v;
            for (long i = 0; i < n; i++) store1(type, to + (c + i) * size, out[i]);
        }
    }
}

/* to [hidden] = sum over j of rows[j] * gates[j], products rounded to bfloat16 if both are, in the order of j */
INLINE void combine_row(int type, int gates_type, long hidden, int k, const char *const *rows, const char *gates, char *to)
{
    const long size = type_bytes(type), weight_size = type_bytes(gates_type);
    const int between = type == BF16 && gates_type == BF16 ? BF16 : F32;
    long c = 0;
    for (; c + LANES <= hidden; c += LANES) {
        vf sum = {0};
        for (int j = 0; j < k; j++)
            sum += rounded(between, load16(type, rows[j] + c * size) * load1(gates_type, gates + j * weight_size));
        store16(type, to + c * size, rounded(type, sum));
    }
    for (; c < hidden; c++) {
        float sum = 0;
        for (int j = 0; j < k; j++) {
            char product[4];
            store1(between, product, load1(type, rows[j] + c * size) * load1(gates_type, gates + j * weight_size));
            sum += load1(between, product);
        }
        store1(type, to + c * size, sum);
    }
}

/* Tokens whose rows lie anywhere in one array. */
typedef struct {
    int type, gates_type, k;
    long hidden;
    const char *outer, *gates;
    const int64_t *place; /* [tokens * k]: the row of each pair; none: in that order */
    char *to;
} combining;

static void combine_unit(void *context, long token)
{
    const combining *c = context;
    const long bytes = c->hidden * type_bytes(c->type);
    const char *rows[c->k];
    for (long j = 0; j < c->k; j++) rows[j] = c->outer + (c->place ? c->place[token * c->k + j] : token * c->k + j) * bytes;
    const char *gates = c->gates + token * c->k * type_bytes(c->gates_type);
    char *to = c->to + token * bytes;
    /* constant types, so that the loops hold no choice */
    if (c->type == BF16 && c->gates_type == BF16) combine_row(BF16, BF16, c->hidden, c->k, rows, gates, to);
    else if (c->type == BF16) combine_row(BF16, F32, c->hidden, c->k, rows, gates, to);
    else combine_row(c->type, c->gates_type, c->hidden, c->k, rows, gates, to);
}
