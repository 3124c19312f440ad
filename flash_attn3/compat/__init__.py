# SPDX-License-Identifier: BSD-3-Clause
"""Attention under the signatures of other packages. Adapters only; importing one registers nothing.

vllm: `vllm_flash_attn`. sglang: `sgl_kernel`. fa2: `flash_attn` 2. raw_ops: `torch.ops.flash_attn_3`.
Their argument orders conflict from the fourth position on, so no one function can serve them all.
"""
