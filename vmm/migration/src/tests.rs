//! Both sides in one process, with guests of plain memory.

mod devices;
mod end_to_end;
mod failures;
mod hand_over;
mod hostile;
mod mock;
mod model;
mod post_copy;
mod proxy;
mod security;
mod slow;
