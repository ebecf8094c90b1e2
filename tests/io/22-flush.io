$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write 0 64k
flush
write -f -P 2 64k 64k
f
read -P 2 64k 64k
