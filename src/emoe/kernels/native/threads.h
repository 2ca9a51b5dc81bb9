/* How many threads: measured while running, per size of call. A second thread doubles the bandwidth on an idle machine,
 * and loses to one alone beside a busy neighbour. No bit of a result depends on it. */

#define SIZES 40       /* classes: powers of two of bytes read */
#define CHOICES 7      /* 1, 2, 4, ... 64 threads */
#define TRIAL_EVERY 96 /* calls of a class from one trial of another number of threads to the next */

static struct {
    float ns_per_byte[CHOICES]; /* a running mean; 0: never tried */
    int choice, trial, calls;
    int64_t chosen_calls[CHOICES];
} sizes[SIZES];

typedef struct {
    int size, choice, threads;
    double bytes;
    int64_t start;
} timing;

/* Threads for a call that reads `bytes`, `most` at most (1: nothing is measured). */
static timing begin_timing(double bytes, int most)
{
    timing t = {-1, 0, 1, bytes, 0};
    if (most < 2) return t;
    int last = 0;
    while (last + 1 < CHOICES && 1 << last < most) last++; /* the last choice is `most` */
    t.size = (int)log2(bytes < 1 ? 1 : bytes);
    if (t.size >= SIZES) t.size = SIZES - 1;
    __typeof__(&sizes[0]) s = &sizes[t.size];
    if (s->choice > last) s->choice = last;
    t.choice = s->choice;
    s->calls++;
    if (s->ns_per_byte[t.choice] > 0 && (s->calls % TRIAL_EVERY == 0 || s->calls < 4 * (last + 1))) {
        s->trial = s->trial < t.choice ? t.choice + 1 : t.choice - 1; /* neighbours in turn */
        if (s->trial < 0 || s->trial > last) s->trial = s->trial < 0 ? t.choice + 1 : t.choice - 1;
        if (s->trial >= 0 && s->trial <= last) t.choice = s->trial;
    }
    t.threads = 1 << t.choice < most ? 1 << t.choice : most;
    t.start = now_ns();
    return t;
}

static void end_timing(const timing *t)
{
    if (t->size < 0) return;
    __typeof__(&sizes[0]) s = &sizes[t->size];
    float took = (float)((double)(now_ns() - t->start) / t->bytes), *mean = &s->ns_per_byte[t->choice];
    if (*mean > 0 && took > 4 * *mean) took = 4 * *mean; /* an interruption */
    *mean = *mean == 0 ? took : *mean + (t->choice == s->choice ? 0.1f : 0.5f) * (took - *mean);
    s->chosen_calls[t->choice]++;
    for (int i = 0; i < CHOICES; i++)
        if (s->ns_per_byte[i] > 0 && s->ns_per_byte[i] < 0.97f * s->ns_per_byte[s->choice]) s->choice = i;
}

/* calls [CHOICES]: how many calls were made with 1, 2, 4, ... threads. */
__attribute__((visibility("default"))) void emoe_thread_counts(int64_t *calls)
{
    for (int i = 0; i < CHOICES; i++) {
        calls[i] = 0;
        for (int j = 0; j < SIZES; j++) calls[i] += sizes[j].chosen_calls[i];
    }
}
