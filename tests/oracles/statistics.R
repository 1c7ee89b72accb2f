# Writes statistics.json: correlations, exact permutation p, Holm, intervals of proportions, BCa and the deviance of an
# additive logistic model, by R's own routines.
#     Rscript tests/oracles/statistics.R        # a minute
suppressMessages({library(boot); library(jsonlite)})

capability <- c(-0.557, 0.482, 1.163, 2.183, 3.143, 4.043, 5.763, 6.503, 6.763)
benchmarks <- list("CALVIN ABC-D" = c(3.096, 3.506, 3.406, 3.856, 4.057, 4.142, 3.943, 4.035, 4.075),
                   "SimplerEnv-Bridge" = c(60.4, 55.3, 57.3, 48.0, 46.9, 49.0, 56.3, 58.3, 44.8),
                   "LIBERO-10" = c(55.0, 44.2, 46.2, 43.0, 45.0, 55.8, 44.4, 46.2, 46.8))
bridge <- rbind(carrot = c(9, 12, 18, 5, 3, 5, 13, 14, 7), eggplant = c(24, 22, 18, 22, 24, 23, 23, 23, 19),
                spoon = c(18, 18, 19, 19, 18, 19, 18, 19, 17), cubes = c(7, 1, 0, 0, 0, 0, 0, 0, 0))

correlation <- function(x, y) {
  p <- cor.test(x, y); s <- suppressWarnings(cor.test(x, y, method = "spearman"))
  set.seed(1)
  bca <- function(method) {
    stat <- function(d, i) cor(d[i, 1], d[i, 2], method = method)
    b <- boot(cbind(x, y), function(d, i) { v <- suppressWarnings(stat(d, i)); if (is.na(v)) stat(d, seq_along(x)) else v },
              R = 40000)
    influence <- empinf(b, type = "jack")  # acceleration from the jackknife about its mean (Efron and Tibshirani, eq. 14.15)
    boot.ci(b, type = "bca", L = influence - mean(influence))$bca[4:5]
  }
  list(pearson = p$estimate[[1]], fisher = as.numeric(p$conf.int), spearman = s$estimate[[1]],
       bca = bca("pearson"), bca_spearman = bca("spearman"))
}
permutations <- function(v) {
  if (length(v) == 1) return(matrix(v, 1))
  do.call(rbind, lapply(seq_along(v), function(i) cbind(v[i], permutations(v[-i]))))
}
every <- permutations(1:7)  # all 5,040 orders of seven models
exact <- function(x, y) mean(abs(apply(every, 1, function(o) cor(x[o], y))) >= abs(cor(x, y)) - 1e-12)
seven <- 1:7
rates <- expand.grid(k = c(0, 1, 5, 12, 24), n = c(24, 96))
rates <- rates[rates$k <= rates$n, ]
d <- expand.grid(model = factor(1:9), task = rownames(bridge))
d$k <- as.vector(t(bridge))
additive <- glm(cbind(k, 24 - k) ~ model + task, binomial, d)

out <- list(
  versions = list(R = R.version.string, boot = as.character(packageVersion("boot"))),
  pairs = lapply(benchmarks, function(y) correlation(capability, y)),
  exact_of_first_seven = lapply(benchmarks, function(y) list(
    pearson = exact(capability[seven], y[seven]), spearman = exact(rank(capability[seven]), rank(y[seven])))),
  holm = list(p = c(0.01, 0.04, 0.03, 0.005, 1, 0.03), adjusted = p.adjust(c(0.01, 0.04, 0.03, 0.005, 1, 0.03), "holm")),
  proportions = lapply(seq_len(nrow(rates)), function(i) {
    k <- rates$k[i]; n <- rates$n[i]
    list(k = k, n = n, clopper_pearson = as.numeric(binom.test(k, n)$conf.int),
         wilson = suppressWarnings(as.numeric(prop.test(k, n, correct = FALSE)$conf.int)))
  }),
  homogeneity = list(
    pooled = suppressWarnings(chisq.test(rbind(colSums(bridge), 96 - colSums(bridge)), correct = FALSE))[c("statistic", "p.value")],
    per_task = apply(bridge, 1, function(k) suppressWarnings(chisq.test(rbind(k, 24 - k), correct = FALSE))$p.value),
    interaction = list(deviance = deviance(additive), df = additive$df.residual,
                       p = pchisq(deviance(additive), additive$df.residual, lower.tail = FALSE)))
)
out$homogeneity$per_task <- as.list(out$homogeneity$per_task)
path <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
write(toJSON(out, digits = 12, auto_unbox = TRUE, pretty = TRUE), sub("[.]R$", ".json", path))
