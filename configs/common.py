"""Every field that a configuration can have, with its default. A configuration changes some of them and adds none."""

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """Return the complete configuration; `options` hold keyword arguments of the object named beside them."""
    c = ConfigDict()
    c.seed = 0
    c.protocol = "jdiff"  # song2021: evaluate and sample as Song et al. 2021 did, with their approximations

    c.data = ConfigDict()
    c.data.name = ""  # as TFDS spells it
    c.data.train = "train"  # splits, as TFDS spells them
    c.data.validation = ""  # choices are made on this one; empty: none
    c.data.test = "test"
    c.data.pairs = ""  # folder of pairs (noise, image) that experiments.reflow made: trained on instead of data.train
    c.data.size = 0  # height and width that the images must have; 0: any
    c.data.flip = False
    c.data.dequantise = True  # train on (k + u) / levels; False: on k / (levels - 1), as published in 2021
    c.data.centered = True  # model space [-1, 1] or [0, 1]
    c.data.logit = False  # instead, all reals: for loss.name "maximum_likelihood"

    c.process = ConfigDict({"name": "VP", "options": ConfigDict()})

    c.network = ConfigDict({"name": "", "options": ConfigDict()})
    c.network.conditional = False  # class labels
    c.network.predict = "v"  # kind of the field that is trained
    # none; scalar, pixel: unit variance by statistics of the data; levels: the network gives logits of levels
    c.network.precondition = "none"
    c.network.cells = 0  # of precondition "levels": neighbouring levels merged into so many cells; 0: none merged

    c.loss = ConfigDict()
    # denoising: at continuous times; ddpm, smld: at the discrete ones of Song et al. 2021; classifier;
    # maximum_likelihood: of the probability flow, or of a coupling flow (network.name); implicit, sliced: of a score,
    # without the noise as a target
    c.loss.name = "denoising"
    c.loss.scales = 1000  # of ddpm and smld: the number of times
    c.loss.reduce_mean = True  # mean over the image; False: half the sum, as published for VE
    c.loss.weight = ConfigDict({"name": "unit", "options": ConfigDict()})
    c.loss.times = ConfigDict({"name": "stratified", "options": ConfigDict()})
    c.loss.times.shift = 1.0  # towards the noise, as Esser et al. 2024 shift them; 1: none
    c.loss.times.weighted = True  # False: the density of the times is itself a weighting, as in Stable Diffusion 3
    # Of data and noise: independent, or optimal_transport inside groups of neighbours of one condition. There example
    # i depends on its whole group, and on nothing outside of it.
    c.loss.coupling = "independent"
    c.loss.coupling_group = 64  # no device, and no part of training.accumulate, may cut one
    # Of maximum_likelihood (see jdiff.cnf): euler, midpoint, heun or rk4 in equal steps from the data to the noise;
    # weights of the regularisers int |v|^2 dt and int |dv/dx|^2 dt; divergence as in likelihood; adjoint or discrete.
    c.loss.cnf = ConfigDict({"solver": "rk4", "steps": 4, "kinetic": 0.0, "jacobian": 0.0})
    c.loss.cnf.update({"divergence": "rademacher", "gradient": "adjoint"})
    c.loss.label_dropout = 0.1  # share of labels replaced by the null label

    c.optimiser = ConfigDict()
    c.optimiser.learning_rate = 2e-4
    c.optimiser.warmup = 0
    c.optimiser.cosine = False  # decay to zero over training.steps
    c.optimiser.b2 = 0.999
    c.optimiser.clip = 1.0  # global norm; 0: none
    c.optimiser.weight_decay = 0.0

    c.training = ConfigDict()
    c.training.initial = ""  # run folder whose averaged parameters training starts from; empty: random ones
    c.training.steps = 0
    c.training.batch_size = 128  # global
    c.training.ema_decay = 0.999
    c.training.ema_warmup = True
    c.training.mapping = "jit"  # jit, shard_map or pmap
    # Devices that share one copy of the state, each holding a part of every array of at least min_size elements.
    # options: {"regular expression of a path": axis to split along, or null for none}; in a file:
    # c.training.sharding.options["up_.*/kernel"] = 0. Of several that are found: the first of the alphabet.
    c.training.sharding = ConfigDict({"fsdp": 1, "min_size": 2**14, "options": ConfigDict(allow_dotted_keys=True)})
    c.training.accumulate = 1  # parts in which a batch is taken one after the other
    c.training.remat = "none"  # dots: only products and convolutions are kept for the backward pass
    c.training.steps_per_call = 1  # on accelerators: spares the host's work between short steps
    c.training.log_every = 50
    c.training.validate_every = 500
    c.training.checkpoint_every = 1000
    c.training.keep = 3

    c.likelihood = ConfigDict()
    c.likelihood.batch_size = 128
    c.likelihood.divergence = "rademacher"
    c.likelihood.probes = 1
    c.likelihood.draws = 1  # dequantisations (each with its own probes) per image
    c.likelihood.variable = "t"  # t, log_snr, asinh or angle: the time in which the solver steps
    c.likelihood.rtol = 1e-5
    c.likelihood.atol = 1e-5
    # 0: the process's own; for truncated_normal and discrete bounds the t where half a cell of a level is 3 sigma
    c.likelihood.t_min = 0.0
    c.likelihood.images = 0  # 0: the whole split
    c.likelihood.tolerance_images = 128  # solved again at a tenth of the tolerance, for the solver's error; 0: none
    c.likelihood.dequantisation = "uniform"  # or truncated_normal
    c.likelihood.importance_samples = 1  # dequantisations in the bound of one draw, weighted by their densities
    # Of --bounds: continuous (of the dequantised image), levels (continuous time, discrete decoder), steps_T (T steps).
    c.likelihood.bounds = "continuous,levels,steps_100,steps_1000"
    c.likelihood.bound_draws = 64  # times in a bound of one draw
    c.likelihood.matmul_precision = "highest"  # of JAX: highest, high or default (what the hardware likes)

    c.sampling = ConfigDict()
    c.sampling.solver = "heun"
    c.sampling.grid = "karras"
    c.sampling.steps = 32
    c.sampling.number = 64
    c.sampling.batch_size = 64
    c.sampling.seed = 0
    c.sampling.label = "null"  # null: unconditional; cycle: image i of class i mod classes; or a class, "3"
    c.sampling.guidance = 1.0  # classifier-free scale; 1: none
    c.sampling.negative = ""  # the class to go away from, "3"; empty: the null label
    c.sampling.autoguidance = 1.0  # scale, away from a weaker model; 1: none
    c.sampling.weak_workdir = ""  # its run folder; empty: this one
    c.sampling.weak_step = 0  # its checkpoint; 0: the newest
    c.sampling.classifier_workdir = ""  # of a noisy classifier that is followed to the label; empty: none
    c.sampling.classifier_scale = 1.0
    c.sampling.guidance_low = c.sampling.guidance_high = 0.0  # guided at times between only; high 0: up to t_max
    c.sampling.guidance_rescale = 0.0  # share of the guided x0 that gets the spread of the unguided one
    c.sampling.threshold = 0.0  # quantile of |x0| to which it is clipped and scaled back into the range; 0: none
    c.sampling.t_min = 0.0  # 0: the process's own
    c.sampling.denoise = True  # one last x0 prediction
    c.sampling.eta = 1.0  # stochasticity of ddim, dpmpp_2m_sde, dpmpp_3m_sde and of the reverse SDE
    c.sampling.variance = "small"  # of ancestral: small or large
    c.sampling.noise = "white"  # brownian: one path of noise per sample, whatever the steps (adaptive_sde: always)
    c.sampling.rtol = c.sampling.atol = 0.0  # of adaptive and adaptive_sde; 0: their default
    c.sampling.churn = 0.0  # of edm: S_churn of Karras et al. 2022
    c.sampling.churn_noise = 1.0  # of edm: S_noise
    c.sampling.order = 0  # of dpm_solver, exponential_adams, deis and unipc; 0: their default
    c.sampling.last_corrector = False  # of unipc: one evaluation more, the last step corrected too
    c.sampling.snr = 0.16  # of the Langevin corrector
    c.sampling.corrector_steps = 1
    # Of --task (docs/control.md); variances and lengths are those of model space.
    c.sampling.control = ConfigDict()
    c.sampling.control.method = "default"  # moment_matching, pseudoinverse, dps, replacement, repaint; sdedit, latent
    c.sampling.control.scale = 0.0  # of the guidance; 0: 1, of dps 2 (superres: 10), the length of a step
    c.sampling.control.noise = 0.05  # standard deviation of what is measured
    c.sampling.control.least = 0.05  # alpha/sigma below which pseudoinverse and moment_matching ask no field
    c.sampling.control.iterations = 3  # of moment_matching's conjugate gradients
    c.sampling.control.resamples = 5  # of repaint
    c.sampling.control.jump = 5  # of repaint, in steps
    c.sampling.control.strength = 0.7  # of sdedit: where it starts, as a part of all time
    c.sampling.control.factor = 4  # of superres
    # Of protocol "song2021": euler_maruyama, reverse_diffusion, ancestral_sampling, none or ode; none, langevin or ald.
    c.sampling.predictor = "euler_maruyama"
    c.sampling.corrector = "none"
    return c
