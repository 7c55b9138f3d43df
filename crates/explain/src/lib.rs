//! One answer for one address; maps; fault traces.
