------------------------------- MODULE Rules -------------------------------
(***************************************************************************)
(* Each rule of the protocol can be switched off by name, as sabotage.rs   *)
(* does in the crate's own tests. "" switches nothing off. spec/check      *)
(* --broken switches off one at a time and wants a counterexample.         *)
(***************************************************************************)
CONSTANT Broken

Off(rule) == Broken = rule
On(rule) == ~Off(rule)
=============================================================================
