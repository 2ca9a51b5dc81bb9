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

/* to [hidden] = sum over j of outer[j] * gates[j], products rounded to bfloat16 if both are, in the order of j */
static void combine_row(int type, int gates_type, long hidden, int k, const char *outer, const char *gates, char *to)
{
    const long size = type_bytes(type), weight_size = type_bytes(gates_type);
    const int between = type == BF16 && gates_type == BF16 ? BF16 : F32;
    long c = 0;
    for (; c + LANES <= hidden; c += LANES) {
        vf sum = {0};
        for (int j = 0; j < k; j++)
            sum += rounded(between, load16(type, outer + (j * hidden + c) * size) * load1(gates_type, gates + j * weight_size));
        store16(type, to + c * size, rounded(type, sum));
    }
    for (; c < hidden; c++) {
        float sum = 0;
        for (int j = 0; j < k; j++) {
            char product[4];
            store1(between, product, load1(type, outer + (j * hidden + c) * size) * load1(gates_type, gates + j * weight_size));
            sum += load1(between, product);
        }
        store1(type, to + c * size, sum);
    }
}
