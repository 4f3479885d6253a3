"""Every kind of cases."""

import kind_heads
import kind_honest
import kind_hooks
import kind_numbers
import kind_steps
import kind_trunks

KINDS = [kind_heads.KIND, kind_honest.KIND, kind_hooks.KIND, kind_steps.KIND, *kind_trunks.KINDS, *kind_numbers.KINDS]
