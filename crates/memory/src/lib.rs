//! Guest RAM, memory slots, the guest physical address space, and the host's page tables read from outside.
