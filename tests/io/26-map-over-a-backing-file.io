$ create -q -f raw base 2M
$ create -q -f qcow2 -b base -F raw disk 4M
@ -f qcow2 disk
map
write -P 1 64k 64k
map
read -P 0 0 64k
read -P 1 64k 64k
write -P 2 1 1
map
read -P 0 2 1000
