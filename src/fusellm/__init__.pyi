# What type checkers and editors see of `fusellm`, whose names are imported when first asked for.
from fusellm.store.facts import StoreFacts as StoreFacts
from fusellm.store.opened import Distribution as Distribution
from fusellm.store.opened import DistributionStore as DistributionStore
from fusellm.store.opened import StoredBlock as StoredBlock
from fusellm.store.opened import open_store as open_store
