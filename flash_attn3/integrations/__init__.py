# SPDX-License-Identifier: BSD-3-Clause
"""Ways into other libraries, one module each. Importing them claims nothing: call their `register()`."""
