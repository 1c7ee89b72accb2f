# Writes mixed.json: binomial mixed models by lme4::glmer on the paper's Bridge counts, on LIBERO-10 totals and on a
# seeded random table.
#     Rscript tests/oracles/mixed.R
suppressMessages({library(lme4); library(jsonlite)})

capability <- c(-0.557, 0.482, 1.163, 2.183, 3.143, 4.043, 5.763, 6.503, 6.763)
bridge <- rbind(carrot = c(9, 12, 18, 5, 3, 5, 13, 14, 7), eggplant = c(24, 22, 18, 22, 24, 23, 23, 23, 19),
                spoon = c(18, 18, 19, 19, 18, 19, 18, 19, 17), cubes = c(7, 1, 0, 0, 0, 0, 0, 0, 0))
libero <- c(275, 221, 231, 215, 225, 279, 222, 231, 234)
set.seed(1)
random <- matrix(rbinom(40, 30, plogis(rnorm(10) + rep(c(-1, 0, 1, 2), each = 10))), nrow = 4, byrow = TRUE)
control <- glmerControl(optimizer = "bobyqa", optCtrl = list(maxfun = 1e5), check.conv.singular = "ignore",
                        check.conv.grad = "ignore")

summarise <- function(model) {
  list(slope = fixef(model)[["x"]], stderr = sqrt(vcov(model)["x", "x"]), loglik = as.numeric(logLik(model)),
       sd = as.list(sapply(VarCorr(model), function(v) attr(v, "stddev")[[1]])))
}
one <- function(k, n, x, nodes) {
  d <- data.frame(k = k, n = n, x = as.numeric(scale(x)), model = factor(seq_along(k)))
  summarise(glmer(cbind(k, n - k) ~ x + (1 | model), d, binomial, nAGQ = nodes, control = control))
}
pooled <- function(counts, n, x) {
  d <- expand.grid(model = factor(seq_along(x)), task = rownames(counts))
  d$k <- as.vector(t(counts)); d$n <- n; d$x <- as.numeric(scale(x))[d$model]
  summarise(glmer(cbind(k, n - k) ~ 0 + task + x + (1 | model) + (1 | model:task), d, binomial, control = control))
}
rownames(random) <- letters[1:4]
x <- seq(-1, 2, length.out = 10)^2
out <- list(versions = list(R = R.version.string, lme4 = as.character(packageVersion("lme4"))))
for (nodes in c(1, 9, 25)) {
  fits <- apply(bridge, 1, function(k) one(k, 24, capability, nodes))
  fits$libero <- one(libero, 500, capability, nodes)
  for (task in rownames(random)) fits[[paste0("random_", task)]] <- one(random[task, ], 30, x, nodes)
  out[[paste0("nodes_", nodes)]] <- fits
}
out$pooled <- list(bridge = pooled(bridge, 24, capability), random = pooled(random, 30, x))
out$random <- random
out$random_x <- x
path <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
write(toJSON(out, digits = 10, auto_unbox = TRUE, pretty = TRUE), sub("[.]R$", ".json", path))
