# Writes compare.json: intervals and tests of two policies, and power of a correlation, by R.
#
#     Rscript tests/oracles/compare.R        # about a minute; needs the packages boot and jsonlite
#
# Where R has the method it is called; where it has not, the definition is solved by brute force (Tango's restricted
# likelihood by optimize and uniroot, sign flips by listing all of them, power by integrating noncentral t over the
# distribution of the predictor's sum of squares).

library(boot)
library(jsonlite)

# Pairs: A alone, B alone, both, neither.
pairs <- list(c(3, 9, 5, 7), c(0, 5, 10, 9), c(5, 0, 0, 0), c(0, 0, 20, 4), c(20, 41, 10, 25), c(86, 150, 794, 570),
              c(4, 4, 3, 1), c(1, 0, 0, 0), c(0, 24, 0, 0))

score <- function(delta, b, c, n, z) {
  # Restricted maximum likelihood of q = P(B alone) given P(A alone) = q + delta, by a search.
  low <- max(0, -delta); high <- (1 - delta) / 2
  term <- function(count, p) if (count == 0) 0 else count * log(pmax(p, 1e-300))
  loglik <- function(q) term(b, q + delta) + term(c, q) + term(n - b - c, 1 - 2 * q - delta)
  q <- optimize(loglik, c(low, high), maximum = TRUE, tol = 1e-14)$maximum
  # the ends themselves, which a search only nears
  ends <- c(low, high); values <- sapply(c(ends, q), loglik); q <- c(ends, q)[which.max(values)]
  (b - c - n * delta)^2 - z^2 * n * (2 * q + delta * (1 - delta))
}

tango <- function(b, c, n, level) {
  z <- qnorm(0.5 + level / 2); estimate <- (b - c) / n; f <- function(d) score(d, b, c, n, z)
  low <- if (c == n) -1 else uniroot(f, c(-1 + 1e-9, estimate - 1e-9), tol = 1e-12)$root
  high <- if (b == n) 1 else uniroot(f, c(estimate + 1e-9, 1 - 1e-9), tol = 1e-12)$root
  c(low, high)
}

mcnemar <- lapply(pairs, function(x) {
  m <- x[1] + x[2]
  p <- if (m == 0) 1 else binom.test(x[1], m)$p.value
  mid <- if (m == 0) 0.5 else if (x[1] == x[2]) 1 - 0.5 * dbinom(x[1], m, 0.5) else p - dbinom(x[1], m, 0.5)
  list(pair = x, p = p, mid_p = mid, tango95 = tango(x[1], x[2], sum(x), 0.95), tango90 = tango(x[1], x[2], sum(x), 0.9))
})

counts <- list(c(0, 10), c(10, 10), c(1, 1), c(7, 24), c(46, 96), c(53, 96), c(268, 500))
single <- lapply(counts, function(x) list(
  counts = x,
  clopper_pearson = as.numeric(binom.test(x[1], x[2])$conf.int),
  wilson = as.numeric(suppressWarnings(prop.test(x[1], x[2], correct = FALSE))$conf.int)
))

two <- list(c(56, 70, 48, 80), c(44, 96, 27, 96), c(10, 10, 0, 10), c(0, 24, 0, 24), c(23, 96, 46, 96), c(5, 56, 0, 29))
wilson <- function(k, n) as.numeric(suppressWarnings(prop.test(k, n, correct = FALSE))$conf.int)
unpaired <- lapply(two, function(x) {
  p1 <- x[1] / x[2]; p2 <- x[3] / x[4]; w1 <- wilson(x[1], x[2]); w2 <- wilson(x[3], x[4])
  list(counts = x, fisher = fisher.test(matrix(c(x[1], x[2] - x[1], x[3], x[4] - x[3]), 2))$p.value,
       newcombe = c(p1 - p2 - sqrt((p1 - w1[1])^2 + (w2[2] - p2)^2), p1 - p2 + sqrt((w1[2] - p1)^2 + (p2 - w2[1])^2)))
})

flips <- lapply(list(c(3, -1, 2, 0, 5, -4, 1, 1, 2, -2, 3, 4), c(1, 1, 1, 1, 1), c(5, -5, 2, -2), c(0, 0, 3)), function(d) {
  signs <- as.matrix(expand.grid(rep(list(c(-1, 1)), length(d))))
  sums <- abs(signs %*% d); total <- abs(sum(d))
  list(differences = d, p = mean(sums >= total), mid_p = mean(sums > total) + mean(sums == total) / 2)
})

set.seed(7)
near <- rbinom(40, 1, 0.7) - rbinom(40, 1, 0.5)
far <- rbinom(60, 1, 0.4) - rbinom(60, 1, 0.3)
lengths <- sample(0:5, 200, TRUE, prob = c(.08, .1, .12, .12, .13, .45))
strata <- function(values, groups) {
  b <- boot(values, function(v, i) mean(v[i]), R = 200000, strata = groups)
  as.numeric(boot.ci(b, type = "bca")$bca[4:5])
}
bootstrap <- list(
  list(values = list(near, far), bca = strata(c(near, far), rep(1:2, c(40, 60)))),
  list(values = list(lengths), bca = strata(lengths, rep(1, 200)))
)

p <- c(0.01, 0.04, 0.03, 0.005, 0.2, 0.04)
seeds <- list(a = c(0.51, 0.55, 0.48), b = c(0.40, 0.44))

power <- function(rho, n) {
  edge <- qt(0.975, n - 2); slope <- rho / sqrt(1 - rho^2)
  inside <- function(s) dchisq(s, n - 1) * (pt(-edge, n - 2, slope * sqrt(s)) + pt(edge, n - 2, slope * sqrt(s), lower.tail = FALSE))
  integrate(inside, 0, Inf, rel.tol = 1e-9, subdivisions = 2000L)$value
}
mean_r <- function(rho, n) {
  # r = t / sqrt(n - 2 + t^2), t noncentral given the sum of squares; P(r > u) integrated over u
  slope <- rho / sqrt(1 - rho^2)
  above <- function(u) sapply(u, function(v) {
    t <- v * sqrt(n - 2) / sqrt(1 - v^2)
    integrate(function(s) dchisq(s, n - 1) * pt(t, n - 2, slope * sqrt(s), lower.tail = FALSE), 0, Inf, rel.tol = 1e-8)$value
  })
  integrate(above, -0.999999, 0.999999, rel.tol = 1e-6, subdivisions = 500L)$value - 0.999999
}
grid <- expand.grid(rho = c(0.3, 0.5, 0.8, 0.95), n = c(4, 9, 15, 30, 60))
write_json(list(
  R = R.version.string, mcnemar = mcnemar, single = single, unpaired = unpaired, sign_flip = flips, bootstrap = bootstrap,
  holm = list(p = p, adjusted = p.adjust(p, "holm")),
  welch = list(a = seeds$a, b = seeds$b, interval = as.numeric(t.test(seeds$a, seeds$b)$conf.int)),
  power = lapply(seq_len(nrow(grid)), function(i) list(rho = grid$rho[i], n = grid$n[i], power = power(grid$rho[i], grid$n[i]))),
  expected_r = lapply(c(4, 9, 20), function(n) list(rho = 0.8, n = n, r = mean_r(0.8, n)))
), "tests/oracles/compare.json", digits = NA, auto_unbox = TRUE, pretty = TRUE)
