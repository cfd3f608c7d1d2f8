# SPDX-License-Identifier: Apache-2.0
"""What an implementation of PDGR is held against: by the tests, by the benchmark, and by code of others."""
