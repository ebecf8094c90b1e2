$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -P 1 0 64k
reopen -r
read -P 1 0 64k
reopen -w
write -P 2 0 64k
read -P 2 0 64k
reopen -c none
read -P 2 0 64k
reopen -r -w
reopen -c fast
