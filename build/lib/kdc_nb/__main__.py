"""`python -m kdc_nb` is `kdc_sweep`, for torchrun and where nothing is installed"""
import sys

from kdc_nb import kdc_sweep

sys.exit(kdc_sweep())
