"""Training objectives of a stage: answers (of the data and a teacher), or facts about images."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from antgmm_jax.config import LMMConfig, Remat
from antgmm_jax.pure import Functional, Params, abstract, functional
from data.batching import Batches
from data.facts import Loss, classes_of, facts_loss, with_heads
from data.maad.cell_grid import cell_classes
from data.maad.drawing import latent_sizes
from data.maad.tiers import tier
from distill import NO_TEACHER, Optimizer, State, Step, Teacher, init_state, make_step, parts, shard_state
from distill.adapters import adapted, merged, shapes_with_adapters, with_adapters
from distill.step import jitted
from experiments.run.cuts import reads_features, segment_targets
from experiments.run.features import ImageFeatures
from experiments.run.rows.samples import Samples
from experiments.run.schema import MaadData, Recipe, Stage, Training, Work
from experiments.run.student import Student
from experiments.run.targets import names_read


class Shared(NamedTuple):
    """Objects that all stages of a run share.

    Attributes:
        recipe: recipe of the run.
        teacher: source of targets; an online teacher without its parameters.
        frozen: loads the parameters of the teacher; they are on the devices only while a stage trains.
        samples: training records.
        features: cached image features of the records.
        bridge_weights: stage -> weights of the bridge's output tokens for `distill.parts`.
    """

    recipe: Recipe | Training
    teacher: Teacher
    frozen: Callable[[], Params]
    samples: Samples
    features: ImageFeatures
    bridge_weights: Callable[[Stage], np.ndarray | None]


class Objective(Protocol):
    """Training objective of a stage.

    Attributes:
        data: training batches.
        teacher: source of targets, without its parameters.
        root: prefix of the model's parameter paths in the trained parameters.
    """

    root: str
    data: Batches
    teacher: Teacher

    def shapes(self) -> Params:
        """Returns the shapes of the parameters before the first step."""
        ...

    def begin(self) -> Params:
        """Loads the parameters before the first step; nothing else uses the arrays."""
        ...

    def frozen(self) -> Params:
        """Loads the parameters of the teacher."""
        ...

    def like(self, config: LMMConfig, optimizer: Optimizer) -> State:
        """Returns a state, or its shapes, as the target for restoring a checkpoint."""
        ...

    def step(self, config: LMMConfig, keep: Mapping[str, np.ndarray], optimizer: Optimizer) -> Step:
        """Creates the train step for a model with the kept units `keep` of the teacher."""
        ...

    def learnt(self, trained: Params) -> Params:
        """Returns the trained parameters of the model, by top-level names; nothing else uses the arrays afterwards."""
        ...


class Answers:
    """Training on labels and on a teacher's outputs.

    Args:
        work: the stage.
        shared: objects that all stages share.
        start: model before the stage.
    """

    root = ""

    def __init__(self, work: Work, shared: Shared, start: Student):
        self._stage, self._start, self._seed, self._narrow = work.stage, start, work.seed, work.narrow
        table, self.teacher, self._frozen = shared.recipe.teacher, NO_TEACHER, dict
        if table and work.stage.loss.reads_teacher:
            self.teacher = shared.teacher.only(names_read(table, [work.stage.loss]))
            self._frozen = shared.frozen
        self._towers = table.states if table else ()
        self._bridge_weights = shared.bridge_weights(work.stage)
        self.data = self._shuffled(work.seed, shared)

    def shapes(self) -> Params:
        """Returns the shapes of the parameters before the first step."""
        return shapes_with_adapters(abstract(self._start.config), self._stage.adapters)

    def begin(self) -> Params:
        """Loads the parameters of the model before the stage, with new adapters if it has any."""
        return self._adapting(self._start.begin(self._narrow))

    def frozen(self) -> Params:
        """Loads the parameters of the teacher, if the losses read it."""
        return self._frozen()

    def like(self, config: LMMConfig, optimizer: Optimizer) -> State:
        """Returns the shapes of a state with sharding for the current mesh, which may differ from the saved one."""
        pure = self._functional(config)
        like = jax.eval_shape(lambda: init_state(self._adapting(pure.init(jax.random.key(0))), optimizer))
        return shard_state(like, pure.axes, optimizer)

    def step(self, config: LMMConfig, keep: Mapping[str, np.ndarray], optimizer: Optimizer) -> Step:
        """Creates a step with the weighted losses of the stage."""
        table = self._stage.optimizer
        compared = parts(config, keep, bridge_weights=self._bridge_weights)
        return make_step(
            self._functional(config, table.remat),
            optimizer,
            self._stage.loss,
            teacher=self.teacher,
            parts=tuple(part for part in compared if part.term == "bridge" or part.tower in self._towers),
            micro_batches=table.accumulate,
            dtype=jnp.dtype(table.dtype),
        )

    def learnt(self, trained: Params) -> Params:
        """Returns all parameters of the model, with the adapters merged."""
        return merged(trained, own=True)

    def _adapting(self, params: Params) -> Params:
        return with_adapters(params, self._stage.adapters, jax.random.key(self._seed))

    def _functional(self, config: LMMConfig, remat: Remat = "dots") -> Functional:
        return adapted(functional(config, remat), self._stage.adapters)

    def _shuffled(self, seed: int, shared: Shared) -> Batches:
        """Training batches, with cached image features if the stage does not change the image side."""
        stage, start, features = self._stage, self._start, None
        on_disk = shared.recipe.features == "disk"
        if on_disk and reads_features(start.config, stage, segment_targets(start.config, stage)[-1]):
            features = shared.features(start, stage.shift, stage.optimizer.dtype)
        else:
            shared.features.drop()
        return shared.samples.shuffled(
            stage.optimizer.batch_size,
            seed,
            # Losses that do not read answers need no buckets of text.
            full=not (stage.loss.reads_answers or shared.samples.pack),
            features=features,
            pictures=self.teacher.reads_images,
            rows=shared.samples.repeated(stage.visits),
            shift=stage.shift,
        )


class Facts:
    """Pretraining of the image side on facts about images, with heads that are dropped afterwards.

    Args:
        work: the stage.
        shared: objects that all stages share.
        start: model before the stage.

    Raises:
        AntgmmError: the model does not fit the facts, or rows lack facts.
    """

    root, teacher = "model/", NO_TEACHER

    def __init__(self, work: Work, shared: Shared, start: Student):
        data, key = shared.recipe.data, jax.random.key(work.seed)
        drawn = tier(data.tier) if isinstance(data, MaadData) else None
        self._stage, self._params = work.stage, start.begin(work.narrow)
        self._facts = latent_sizes(drawn.name) if drawn else classes_of(shared.samples.latents())
        classes = cell_classes(drawn) if drawn else 0
        self._trained = with_heads(start.config, self._params, self._facts, classes, key)
        shared.features.drop()
        self.data = shared.samples.facts(work.stage.optimizer.batch_size, work.seed, [*self._facts])

    def shapes(self) -> Params:
        """Returns the shapes of the image side with heads."""
        return jax.eval_shape(lambda: self._trained)

    def begin(self) -> Params:
        """Returns the image side with heads."""
        return jax.tree.map(jnp.copy, self._trained)

    def frozen(self) -> Params:
        """Returns no parameters, as there is no teacher."""
        return {}

    def like(self, config: LMMConfig, optimizer: Optimizer) -> State:
        """Returns an initial state."""
        return init_state(self._trained, optimizer)

    def step(self, config: LMMConfig, keep: Mapping[str, np.ndarray], optimizer: Optimizer) -> Step:
        """Creates a step with the losses of facts and, for MAAD-synth, of cells."""
        table = self._stage.optimizer
        return facts_step(
            facts_loss(config, self._params, self._facts, dtype=jnp.dtype(table.dtype), remat=table.remat),
            optimizer,
        )

    def learnt(self, trained: Params) -> Params:
        """Returns the parameters of the image side."""
        return trained["model"]


def facts_step(loss: Loss, optimizer: Optimizer) -> Step:
    """Creates the train step for facts, for `distill.train`.

    Args:
        loss: from `data.facts.facts_loss`.
        optimizer: from `distill.make_optimizer`.

    Returns:
        The step; it ignores gates and teacher. Metrics: those of the loss, `loss`, `grad_norm` and `learning_rate`.
    """

    def step(state: State, batch: Any, gates: Any, teacher: Any, rate: jax.Array):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics = {"loss": value, **metrics, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return State(params, opt_state, state.step + 1), metrics

    return jitted(step, optimizer)


OBJECTIVES: dict[str, Callable[[Work, Shared, Student], Objective]] = {"answers": Answers, "facts": Facts}
"""Name -> training objective."""
