"""SparseFW: Frank-Wolfe on the mask, relaxed to [0, 1]; the kept weights stay as they are.

With R = W0 * (1 - M) what a mask M takes away, the problem is

    min f(M) = tr(R H R^T)  over 0 <= M <= 1 with at most as many ones as the pattern allows.

Scores S of a warm start (Wanda, RIA, magnitude) choose the start mask; its floor(alpha k) highest
scores of the k that it keeps are kept for ever: M = 1 there. From M = the start mask, for t = 0, 1, ...

    G = -grad f / 2 = W0 * (R H)                                         (1)  the one product of a step
    V = 1 at the largest entries of G that the pattern has room for,
        beside what is kept for ever, and only where G > 0               (2)
    M <- (1 - eta) M + eta V                                             (3)
    eta = 2 / (t + 2 + offset)                                           (4a) open loop
    eta = clip(<R H, E> / <E H, E>, 0, 1),  E = W0 * (V - M)             (4b) exact line search

M is rounded to the pattern's choice of its largest entries every ``round_every`` steps and after the
last (5); the best of these masks and the start is the answer, so it is never worse than the start.

| code  | paper      | shape     | meaning                                                      |
|-------|------------|-----------|--------------------------------------------------------------|
| M     | M + M-bar  | (out, in) | relaxed mask, 1 where a weight is kept for ever              |
| RH    |            | (out, in) | R H; by line search it is carried: R H <- R H - eta E H      |
| scores| -grad f    | (out, in) | G, then V, then V - M                                        |
| lock  | M-bar      | (out, in) | infinity where a weight is kept for ever, else 0             |
"""
