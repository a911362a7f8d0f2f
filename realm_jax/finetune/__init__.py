"""Training adapters on packed weights: `finetune` from files to files, `train` in memory."""

from realm_jax.finetune.config import AdapterConfig as AdapterConfig
from realm_jax.finetune.config import DataConfig as DataConfig
from realm_jax.finetune.config import FinetuneConfig as FinetuneConfig
from realm_jax.finetune.config import TrainingConfig as TrainingConfig
from realm_jax.finetune.data import load_data as load_data
from realm_jax.finetune.data import make_data as make_data
from realm_jax.finetune.job import finetune as finetune
from realm_jax.finetune.job import prepare as prepare
from realm_jax.finetune.job import train_in as train_in
from realm_jax.finetune.rows import Example as Example
from realm_jax.finetune.rows import Rows as Rows
from realm_jax.finetune.rows import make_rows as make_rows
from realm_jax.finetune.train import Data as Data
from realm_jax.finetune.train import mean_loss as mean_loss
from realm_jax.finetune.train import train as train
